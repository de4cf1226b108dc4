"""Train one LoRA adapter on one subset with TRL; the base model stays in memory, adapters are swapped in."""

import atexit
import gc
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Sampler
from transformers import PrinterCallback
from trl import SFTConfig, SFTTrainer

from fedrouter.config import LoraSettings, TrainSettings
from fedrouter.errors import ModelError, first_line
from fedrouter.train.client.rows import Tokeniser, TokenRow, labels_of, positions_of
from fedrouter.train.client.targets import for_peft, outside
from fedrouter.train.federation import Trained
from fedrouter.train.lora import average, cut, rank_of
from fedrouter.train.memory import out_of_memory
from fedrouter.types import AdapterState, Record

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

IGNORED = -100  # label of tokens without loss, PyTorch's default


def tokenise(records: Sequence[Record], tokenizer: "PreTrainedTokenizerBase", max_length: int) -> Dataset:
    """Turn records into token ids and labels, with loss only on answers (rows.py)."""
    return _dataset(Tokeniser(tokenizer, max_length).rows(records))


def _dataset(rows: Sequence[TokenRow]) -> Dataset:
    return Dataset.from_dict(
        {"input_ids": [row.ids for row in rows], "labels": [labels_of(row, IGNORED) for row in rows]}
    )


class _StepsByLength(Sampler[int]):
    """Sorts the rows of each optimizer step by length: less padding in its batches, same gradient."""

    def __init__(self, rows: Sampler[int], lengths: Sequence[int], size: int):
        self._rows, self._lengths, self._size = rows, lengths, size

    def __iter__(self) -> Iterator[int]:
        order = list(self._rows)
        for start in range(0, len(order), self._size):
            yield from sorted(order[start : start + self._size], key=self._lengths.__getitem__)

    def __len__(self) -> int:
        return len(self._lengths)


class _Trainer(SFTTrainer):  # type: ignore[misc]
    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Any:
        sampler, times = super()._get_train_sampler(train_dataset), self.args.gradient_accumulation_steps
        if times == 1:
            return sampler
        lengths = [len(ids) for ids in self.train_dataset["input_ids"]]
        return _StepsByLength(sampler, lengths, times * self.args.per_device_train_batch_size)


class AdapterTrainer:
    """Trains adapters on one resident base model.

    Parameters
    ----------
    model : the frozen base model, to which LoRA layers are added.
    seed : for the initial A matrices; B starts at zero, so a fresh adapter changes nothing.
    tokeniser : a tokeniser that has cached the rows already.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        lora: LoraSettings,
        settings: TrainSettings,
        seed: int,
        tokeniser: Tokeniser | None = None,
    ):
        disable_progress_bar()
        torch.manual_seed(seed)
        config = LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=for_peft(model, lora.target_modules),
            exclude_modules=outside(model),
            task_type="CAUSAL_LM",
        )
        try:
            self.model: Any = get_peft_model(model, config)
        except ValueError as error:
            raise ModelError(f"lora.target_modules {lora.target_modules}: {first_line(error)}") from error
        self._tokenizer = tokenizer
        self.tokeniser = tokeniser or Tokeniser(
            tokenizer, settings.max_length, positions_of(model.config), settings.loss == "last"
        )
        self.settings, self.freeze_a = settings, lora.freeze_a
        if lora.freeze_a:
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(parameter.requires_grad and ".lora_A." not in name)
        if getattr(model, "is_loaded_in_4bit", False):
            # TRL trains adapters of a quantised base in bfloat16. Cast now: a later cast would allocate new
            # tensors, and ``_tensors`` below would no longer share memory with them.
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.to(torch.bfloat16)
        # These tensors share memory with the model's parameters: writing into them swaps the adapter.
        self._tensors: Mapping[str, torch.Tensor] = get_peft_model_state_dict(self.model)
        # Every TRL trainer ends with a full garbage collection; spare it the long-lived objects.
        gc.collect()
        gc.freeze()
        atexit.register(gc.unfreeze)  # objects still frozen at exit are reported as leaks
        self._tokenising = threading.Lock()  # a tokenizer is not thread-safe
        self._scratch = tempfile.TemporaryDirectory(prefix="fedrouter-")

    @property
    def adapter_config(self) -> dict[str, Any]:
        """Content of ``adapter_config.json``, in a stable order."""
        config = self.model.peft_config["default"].to_dict()
        config["inference_mode"] = True
        return {
            k: sorted(v) if isinstance(v, set) else getattr(v, "value", v) for k, v in sorted(config.items())
        }

    @property
    def validation(self) -> float:
        """Share of a subset's rows that is held out for validation."""
        return self.settings.validation

    @property
    def batch_size(self) -> int:
        """Rows per optimizer step."""
        return self.settings.step_size

    @property
    def trained(self) -> list[str]:
        """Names of the tensors that training changes."""
        return [name for name in sorted(self._tensors) if not (self.freeze_a and ".lora_A." in name)]

    def tokenise(self, records: Sequence[Record]) -> Dataset:
        """Tokenise records for this trainer's base model."""
        with self._tokenising:
            return _dataset(self.tokeniser.rows(records))

    def rehearse(self, records: Sequence[Record], learning_rate: float) -> None:
        """Try one training step on the longest rows and one average, so that neither fails after hours.

        The model is restored afterwards.

        Raises
        ------
        ModelError
            If the step or the average fails or gives numbers that are not finite.
        """
        rows = sorted(self.tokeniser.rows(records), key=lambda row: len(row.ids))[-self.batch_size :]
        fresh = self.state()
        try:
            trained = self.train(fresh, _dataset(rows), 1, learning_rate, seed=0)
            merged = average([trained.adapter, fresh], [1, 1])
        except Exception as error:
            if out_of_memory(error):
                raise
            raise ModelError(
                f"one training step on the longest rows failed: {type(error).__name__}: "
                f"{first_line(error)}; this base cannot be trained with these settings"
            ) from error
        finally:
            self._load_adapter(fresh)
        if not (np.isfinite(trained.loss) and all(np.isfinite(array).all() for array in merged.values())):
            raise ModelError(
                "one training step on the longest rows gave numbers that are not finite: "
                "lower train.learning_rate, or set base.dtype to float32"
            )

    def take_out(self) -> None:
        """Set all adapter weights to zero, so that the model embeds as the base model does."""
        with torch.no_grad():
            for tensor in self._tensors.values():
                tensor.zero_()
        self.model.eval()

    def state(self) -> AdapterState:
        """Return a copy of the adapter in the model."""
        return {
            name: tensor.detach().float().cpu().numpy().copy()
            for name, tensor in sorted(self._tensors.items())
        }

    def train(
        self, adapter: AdapterState, data: Dataset, steps: int, learning_rate: float, seed: int
    ) -> Trained:
        """Train ``adapter`` on ``data`` for ``steps`` optimizer steps with a fresh AdamW (paper section 4).

        An adapter of lower rank keeps its rank but is trained with this trainer's scale (alpha / rank). Equal
        arguments and an equal number of threads give equal bytes.
        """
        began = time.perf_counter()
        self._load_adapter(adapter)
        base, device = self.model.get_base_model(), self.model.device.type
        arguments = SFTConfig(
            output_dir=self._scratch.name,
            max_steps=steps,
            per_device_train_batch_size=self.settings.batch_size,
            gradient_accumulation_steps=self.settings.gradient_accumulation,
            learning_rate=learning_rate,
            lr_scheduler_type="constant",
            weight_decay=self.settings.weight_decay,
            optim="adamw_torch",
            seed=seed,
            use_cpu=device == "cpu",
            bf16=device == "cuda" and base.dtype == torch.bfloat16,
            gradient_checkpointing=False,  # enabled below: every TRL trainer would leave an embedding hook
            max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True},
            dataloader_pin_memory=device == "cuda",
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        # With several GPUs the Trainer would use all of them and multiply the batch size.
        arguments._n_gpu = min(arguments.n_gpu, 1)
        trainer = _Trainer(
            model=self.model, args=arguments, train_dataset=data, processing_class=self._tokenizer
        )
        trainer.remove_callback(PrinterCallback)
        if self.settings.gradient_checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        hooks = self._add_proximal_gradients(self.settings.proximal) if self.settings.proximal else []
        try:
            loss = trainer.train().training_loss
        finally:
            for hook in hooks:
                hook.remove()
            # Every TRL trainer wraps the base model's forward; remove the wrapper, or they accumulate.
            vars(base).pop("forward", None)
            if self.settings.gradient_checkpointing:
                base.gradient_checkpointing_disable()
                base.disable_input_require_grads()
        trained = cut(self.state(), rank_of(adapter))
        if device == "cuda":
            del trainer
            torch.cuda.empty_cache()  # batches of the next client have other shapes
        return Trained(trained, self._examples(len(data), steps), float(loss), time.perf_counter() - began)

    @torch.no_grad()
    def loss(self, adapter: AdapterState, data: Dataset) -> tuple[float, int]:
        """Return an adapter's mean loss on ``data``, nats per completion token, and the number of tokens."""
        self._load_adapter(adapter)
        self.model.eval()
        total = num_tokens = 0.0
        order = np.argsort([len(ids) for ids in data["input_ids"]], kind="stable")  # less padding
        for chosen in np.split(order, range(self.settings.batch_size, len(order), self.settings.batch_size)):
            rows = data[chosen]
            ids = [torch.tensor(row) for row in rows["input_ids"]]
            labels = pad_sequence([torch.tensor(row) for row in rows["labels"]], True, IGNORED)
            mask = pad_sequence([torch.ones_like(row) for row in ids], True)
            inputs = pad_sequence(ids, True).to(self.model.device)
            logits = self.model(input_ids=inputs, attention_mask=mask.to(self.model.device)).logits
            flat = logits[:, :-1].float().flatten(0, 1)
            targets = labels[:, 1:].flatten().to(flat.device)
            total += float(
                torch.nn.functional.cross_entropy(flat, targets, ignore_index=IGNORED, reduction="sum")
            )
            num_tokens += int((targets != IGNORED).sum())
        return total / max(num_tokens, 1), int(num_tokens)

    def _load_adapter(self, adapter: AdapterState) -> None:
        """Write the adapter into the model; missing slices are set to zero and get zero gradients."""
        with torch.no_grad():
            for name, tensor in self._tensors.items():
                array = torch.from_numpy(adapter[name])
                tensor.zero_()[: array.shape[0], : array.shape[1]].copy_(array)

    def _add_proximal_gradients(self, mu: float) -> list[Any]:
        """Add the gradient of FedProx's μ/2 ‖w - w₀‖² (Li et al. 2020) to every gradient; losses omit it."""

        def proximal_hook(
            parameter: torch.Tensor, start: torch.Tensor
        ) -> Callable[[torch.Tensor], torch.Tensor]:
            return lambda gradient: gradient + mu * (parameter.detach() - start)

        trained = [p for p in self.model.parameters() if p.requires_grad]
        return [p.register_hook(proximal_hook(p, p.detach().clone())) for p in trained]

    def _examples(self, num_rows: int, steps: int) -> int:
        batch = self.batch_size
        epochs, rest = divmod(steps, int(np.ceil(num_rows / batch)))
        return epochs * num_rows + min(rest * batch, num_rows)
