"""All cells of an experiment, in parallel processes; an interrupted experiment can be resumed."""

import gc
import multiprocessing
import os
import shutil
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import torch
from rich.console import Console

from fedrouter.bundle import find_base
from fedrouter.errors import TrainingError, first_line
from fedrouter.experiment.cell import Trained, embedder_of, merged, searched, tested, train_cell
from fedrouter.experiment.compare import OURS
from fedrouter.experiment.compose import write_mixes
from fedrouter.experiment.engine import Transformers, Vllm
from fedrouter.experiment.grid import Cell, cells_of, search_of, with_rate
from fedrouter.experiment.report import PAGE, write_report
from fedrouter.experiment.results import RESULTS, Line, read_results, write_results
from fedrouter.experiment.settings import Settings
from fedrouter.files import check_directory
from fedrouter.layout import print_line
from fedrouter.serve.checks import free_port
from fedrouter.serve.launch import Options, running_server
from fedrouter.train.machine import device_and_dtype

Pool = ProcessPoolExecutor | None


def run_experiment(
    settings: Settings,
    out: Path,
    console: Console,
    *,
    jobs: int = 1,
    only: Sequence[str] = (),
    results: Path | None = None,
) -> dict[str, Line]:
    """Run the cells that have no line of results yet; return all lines by cell.

    Parameters
    ----------
    out : directory for the report and one directory per cell, in which an interrupted cell is resumed.
    jobs : number of cells in parallel, each in a process; they share a GPU.
    only : patterns of cells (``english-6m/dual/*``).
    results : results file; default: ``results.jsonl`` in ``out``.

    Raises
    ------
    TrainingError
        If cells failed; raised after all other cells have finished.
    """
    file = results or out / RESULTS
    lines = read_results(file)
    check_directory(out, "--out")
    cells = cells_of(settings, only)
    failed: dict[str, str] = {}

    def work(todo: Sequence[Cell], pool: Pool) -> None:
        for cell in todo:  # a longer search may have changed a cell's learning rate
            if cell.rate not in (None, lines.get(cell.key, {}).get("learning_rate", cell.rate)):
                del lines[cell.key]
                shutil.rmtree(out / cell.key, ignore_errors=True)
        missing = [cell for cell in todo if cell.key not in lines]
        console.print(f"{len(todo)} cells, {len(todo) - len(missing)} of them done", highlight=False)
        finished = _in_parallel(settings, missing, out, pool)
        if settings.engine == "vllm" and not todo[0].search:
            finished = _tested_with_vllm(settings, finished, out)
        for cell, line in finished:
            if isinstance(line, str):
                failed[cell.key] = line
                print_line(console, f"{cell.key}: {line}")
                continue
            lines[cell.key] = line
            write_results(file, lines)
            print_line(console, _summary(line))

    with _pool(jobs) as pool:
        search = search_of(settings, cells)
        if search:
            work(search, pool)
        losses: dict[tuple[str, str], dict[float, float]] = defaultdict(dict)
        for cell in search:
            found = lines.get(cell.key, {}).get("loss")
            if found is not None and cell.rate is not None:
                losses[cell.world, cell.method][cell.rate] = found
        work([with_rate(settings, cell, losses[cell.world, cell.method]) for cell in cells], pool)
    write_report(settings, lines, out)
    print_line(console, f"report: {out / PAGE}")
    if failed:
        first = next(iter(failed))
        raise TrainingError(
            f"{len(failed)} cells failed, the first was {first}: {failed[first]}; see train.log and "
            f"error.txt in {out / first}; run the same command again to retry them"
        )
    return lines


def _in_parallel(
    settings: Settings, cells: Sequence[Cell], out: Path, pool: Pool
) -> Iterator[tuple[Cell, Line | str]]:
    """Yield each finished cell with its line, or with an error message."""
    if pool is None:
        for cell in cells:
            yield cell, run_cell(settings, cell, out)
        return
    try:
        waiting = {pool.submit(run_cell, settings, cell, out): cell for cell in cells}
        for future in as_completed(waiting):
            yield waiting[future], future.result()
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in multiprocessing.active_children():  # otherwise exit waits until its cell has finished
            child.terminate()
        raise


@contextmanager
def _pool(jobs: int) -> Iterator[Pool]:
    if jobs == 1:
        yield None
        return
    context = multiprocessing.get_context("spawn")  # CUDA and OpenMP do not survive a fork
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with ProcessPoolExecutor(jobs, context, _set_num_threads, (threads,)) as pool:
        yield pool


def _tested_with_vllm(
    settings: Settings, finished: Iterator[tuple[Cell, Line | str]], out: Path
) -> Iterator[tuple[Cell, Line | str]]:
    """Test trained cells with one server per base, which has the adapters of all its cells."""
    groups: dict[Path, list[Trained]] = defaultdict(list)
    for cell, line in finished:
        if isinstance(line, str):
            yield cell, line
            continue
        trained = train_cell(settings, cell, out)  # only loads the finished run
        trained = replace(trained, seconds=line["train_seconds"])
        groups[find_base(trained.bundle)].append(trained)
    for cells in groups.values():
        adapters = {name: path for trained in cells for name, path in trained.adapters.items()}
        for trained in cells:
            world = settings.worlds[trained.cell.world]
            if world.unseen and trained.config.method == OURS:
                _, mixes = merged(trained, world, embedder_of(trained.bundle))
                adapters |= write_mixes(trained.bundle, mixes, trained.directory / "mixes")
        first = cells[0].bundle
        others = {name: path for name, path in adapters.items() if name not in first.adapter_paths}
        serving = Options(port=free_port(), adapters=others)
        with running_server(first.path, serving, log=out / "server.log") as url:
            engine = Vllm(url)
            for trained in cells:
                yield trained.cell, _line(trained.cell, out, partial(tested, settings, trained, engine))


def run_cell(settings: Settings, cell: Cell, out: Path) -> Line | str:
    """Run a cell; return its line, or an error message, so that other cells continue.

    With vLLM the cell is only trained; all cells are tested together afterwards.
    """

    def run() -> Line:
        trained = train_cell(settings, cell, out)
        if cell.search or settings.engine == "vllm":
            return searched(trained)
        device, dtype = device_and_dtype(trained.config.base)
        template = trained.config.base.chat_template
        return tested(settings, trained, _engine(find_base(trained.bundle), dtype, device, template))

    try:
        return _line(cell, out, run)
    finally:
        gc.unfreeze()  # training freezes objects; the next cell needs their memory
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _line(cell: Cell, out: Path, run: Callable[[], Line]) -> Line | str:
    try:
        return run()
    except Exception as error:
        (out / cell.key).mkdir(parents=True, exist_ok=True)
        (out / cell.key / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")
        return f"{type(error).__name__}: {first_line(error)}"


@cache
def _engine(path: Path, dtype: str, device: str, chat_template: str | None) -> Transformers:
    return Transformers(path, dtype, device, chat_template)


def _set_num_threads(threads: int) -> None:
    torch.set_num_threads(threads)


def _summary(line: Line) -> str:
    if "loss" in line:
        return f"{line['key']}: loss {line['loss']}, {line['train_seconds']} s"
    means = {
        name: sum(sum(p) / len(p) for p in scores["prompts"].values()) / len(scores["prompts"])
        for name, scores in line["scores"].items()
        if "prompts" in scores
    }
    scores = ", ".join(f"{name} {mean:.3f}" for name, mean in means.items())
    return (
        f"{line['key']}: {line['adapters']} adapters, {scores}; "
        f"{line['train_seconds']} + {line['answer_seconds']} s"
    )
