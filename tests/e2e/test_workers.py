"""A real worker: what it answers, and what becomes of it."""

import multiprocessing
from pathlib import Path

import numpy as np
import pytest

from fedrouter.config_file import load_config
from fedrouter.data import builtin_records
from fedrouter.errors import TrainingError, WorkerError
from fedrouter.models import load_base, load_tokenizer, resolve_base
from fedrouter.train.client.sft import AdapterTrainer
from fedrouter.train.client.workers import start_workers


def test_a_worker_answers_as_the_trainer_here_until_it_is_gone() -> None:
    config = load_config(None, ["train.batch_size=2", "lora.rank=2"])
    path = Path(resolve_base(config.base.model))
    here = AdapterTrainer(
        load_base(path, "float32", "cpu"), load_tokenizer(path), config.lora, config.train, config.seed
    )
    (worker,) = start_workers(here, config, path, processes=2)
    rows = worker.tokenise(builtin_records("builtin:four-tasks", "train", 1, 0))
    arguments = here.state(), rows, 3, 1e-2, 5
    with pytest.raises(TrainingError, match=r"^KeyError: 'base_model"):
        worker.train({}, rows, 3, 1e-2, 5)
    found, wanted = worker.train(*arguments), here.train(*arguments)
    assert (found.loss, found.num_examples) == (wanted.loss, wanted.num_examples)
    for name, array in wanted.adapter.items():
        np.testing.assert_array_equal(found.adapter[name], array)
    assert worker.loss(found.adapter, rows) == here.loss(wanted.adapter, rows)
    (process,) = multiprocessing.active_children()
    process.kill()
    with pytest.raises(WorkerError, match=r"ended with code -9: .* fewer --processes"):
        worker.train(*arguments)


def test_a_worker_ends_with_the_connection_to_it() -> None:
    config = load_config(None, [])
    here = object()  # nothing is asked of it
    workers = start_workers(here, config, Path(resolve_base(config.base.model)), 2)  # type: ignore[arg-type]
    (process,) = multiprocessing.active_children()
    workers.clear()
    process.join(120)
    assert process.exitcode == 0
