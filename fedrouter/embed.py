"""Text → vectors: the embedder that training, serving and offline routing share.

φ(x) is the mean over the prompt's tokens of the hidden states in a model's middle layer, each scaled to unit
length: in pretrained decoders one token, the "attention sink" (Xiao et al. 2024), has a state a hundred times
as long as the others and would dominate an unscaled mean. The paper (section 3) uses the unscaled mean of the
last layer. Adapters are off, and the raw prompt is embedded, without the chat template. The model is the base
if it is small, else a small encoder (``chosen``), so that the cost of routing does not grow with the base.
"""

import threading
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from fedrouter.config import EmbedderSettings
from fedrouter.embed_endpoint import KIND as ENDPOINT
from fedrouter.embed_endpoint import EndpointEmbedder, beginning, endpoint_spec
from fedrouter.errors import ConfigError, ModelError, first_line
from fedrouter.models import ENCODER, base_fingerprint, quieten, resolve_base
from fedrouter.types import Array, BaseSpec, EmbedderSpec, Turn

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

BATCH_TOKENS = 4096  # padded tokens in one forward pass; bounds memory
MAX_PADDING = 0.25  # share of a batch's shortest text; padding costs as much as tokens, another pass little

CHEAP = 6_000_000  # parameters of the layers below the middle; ENCODER has as many
ENCODER_TOKENS = 256  # length of the texts that ENCODER was trained on

TRACED = 100_000_000  # maximum parameters of a model to trace; in larger ones Python's overhead is small

PROBE_TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "How far is the harbour from the old town? - What is the distance between the old town and the harbour?",
    'Ana: are we still on for Friday?\nBen: yes, at six, bring the blue folder | 42 | €7.50 {"k": [1, 2]}',
)
"""Fixed texts whose vectors a bundle records, so that an embedder with other weights is detected."""


class Embedder(Protocol):
    """The interface of embedders."""

    spec: EmbedderSpec

    def embed(self, texts: Sequence[str]) -> Array:
        """Return one vector per text: (n, d) float32, independent of the batch up to rounding."""
        ...


def user_texts(turns: Sequence[Turn]) -> list[str]:
    """Return the texts of the user turns that are not blank, in their order."""
    return [turn.content for turn in turns if turn.role == "user" and turn.content.strip()]


def routing_text(turns: Sequence[Turn]) -> str:
    """Return the text that is embedded for a training record: its last user turn."""
    return next(reversed(user_texts(turns)), "")


class HiddenStateEmbedder:
    """Mean of one layer's hidden states over a text's tokens.

    Parameters
    ----------
    owned : whether ``model`` is not used elsewhere, so that the blocks above the layer can be removed.
    """

    def __init__(
        self,
        model: "torch.nn.Module",
        tokenizer: "PreTrainedTokenizerBase",
        spec: EmbedderSpec,
        owned: bool = False,
    ):
        self.spec = spec
        self._model = model
        self._device = next(model.parameters()).device
        self._tokenizer = tokenizer
        self._causal = spec.kind == "base"
        self._top = _drop_blocks(model, spec.layer) if owned else None
        self._captured = threading.local()  # a reload checks the embedder while requests use it
        self._graph: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
        if self._top is not None:
            self._top.register_forward_hook(self._capture)
            model.requires_grad_(False)  # tracing needs constant weights
            if sum(p.numel() for p in model.parameters()) <= TRACED:
                self._graph = _traced(self._pooled, self._device, spec.max_tokens)

    def embed(self, texts: Sequence[str]) -> Array:
        """Return one vector per text: (n, d) float32; zeros for a text without tokens."""
        import torch

        if not texts:
            return np.zeros((0, self.spec.dim), dtype=np.float32)
        ids = self._tokenizer(
            [beginning(text, self.spec.max_tokens) for text in texts],
            truncation=True,
            max_length=self.spec.max_tokens,
            return_attention_mask=False,
        )["input_ids"]
        vectors = np.zeros((len(ids), self.spec.dim), dtype=np.float32)
        with torch.inference_mode():
            for rows in _batches([len(i) for i in ids]):
                lengths = [len(ids[row]) for row in rows]
                width = lengths[-1]
                tokens = torch.tensor([ids[row] + [0] * (width - len(ids[row])) for row in rows])  # (B, T)
                # Attention is faster without a mask, and a causal model's tokens do not attend to padding.
                masked = not self._causal and lengths[0] < width
                run = partial(self._pooled, masked=True) if masked else self._graph or self._pooled
                vectors[rows] = run(tokens.to(self._device), torch.tensor(lengths, device=self._device)).cpu()
        return vectors

    def _pooled(
        self, tokens: "torch.Tensor", lengths: "torch.Tensor", masked: bool = False
    ) -> "torch.Tensor":
        """Return the mean of the layer's hidden states over each row's first tokens: (B, d) float32."""
        import torch

        mask = torch.arange(tokens.shape[1], device=tokens.device) < lengths.unsqueeze(-1)  # (B, T)
        hidden = self._hidden(tokens, mask.long() if masked else None).float()  # (B, T, d)
        if self.spec.pooling == "unit":
            hidden = torch.nn.functional.normalize(hidden, dim=-1)
        return (hidden * mask.unsqueeze(-1)).sum(dim=1) / lengths.unsqueeze(-1)

    def _hidden(self, tokens: "torch.Tensor", mask: "torch.Tensor | None" = None) -> "torch.Tensor":
        """Return the layer's hidden states: (B, T, d)."""
        if self._top is None:
            states = self._model(input_ids=tokens, attention_mask=mask, output_hidden_states=True)
            return states.hidden_states[self.spec.layer]  # type: ignore[no-any-return]
        self._model(input_ids=tokens, attention_mask=mask, use_cache=False)
        return vars(self._captured).pop("output")  # type: ignore[no-any-return]

    def _capture(
        self, _block: object, _inputs: object, output: "torch.Tensor | tuple[torch.Tensor, ...]"
    ) -> None:
        self._captured.output = output[0] if isinstance(output, tuple) else output


class SentenceEmbedder:
    """A sentence-transformers model with its own pooling."""

    def __init__(self, path: Path, spec: EmbedderSpec):
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise ModelError(
                "embedder kind sentence-transformers is not installed: "
                'pip install "fedrouter[sentence-transformers]"'
            ) from error
        self.spec = spec
        self._model = SentenceTransformer(str(path), device="cpu")
        self._model.max_seq_length = spec.max_tokens

    def embed(self, texts: Sequence[str]) -> Array:
        """Return one vector per text: (n, d) float32."""
        vectors = self._model.encode(
            [beginning(text, self.spec.max_tokens) for text in texts],
            batch_size=64,
            show_progress_bar=False,
            convert_to_numpy=True,
        )
        return np.asarray(vectors, dtype=np.float32).reshape(len(texts), self.spec.dim)


def chosen(settings: EmbedderSettings, base: Path) -> tuple[EmbedderSettings, str]:
    """Resolve kind "auto"; return the settings and the reason in one line, "" for every other kind.

    A small base embeds with its middle layer. A large one would take longer to embed than to answer on a GPU:
    MiniLM replaces it or, if MiniLM cannot be loaded, as many of the base's first layers as are cheap.

    Parameters
    ----------
    base : the directory of the base model.
    """
    if settings.kind != "auto":
        return settings, ""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(str(base)).get_text_config()
    width, inner = config.hidden_size, getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    block = width * (4 * width + 3 * inner)  # upper bound for the parameters of a layer
    given = settings.model_dump(exclude={"kind", "model", "layer"})
    if block * (config.num_hidden_layers // 2) <= CHEAP:
        return EmbedderSettings(kind="base", **given), "prompts are embedded by the base's middle layer"
    try:
        resolve_base(ENCODER)
    except ModelError as error:
        layer = max(1, CHEAP // block)
        return EmbedderSettings(kind="base", layer=layer, **given), (
            f"prompts are embedded by the base's first {layer} layers: the smaller {ENCODER} is unavailable "
            f"({error}); install fedrouter[encoder], or name an encoder in embedder.model"
        )
    given["max_tokens"] = min(settings.max_tokens, ENCODER_TOKENS)
    return EmbedderSettings(kind="encoder", model=ENCODER, **given), (
        f"prompts are embedded by the middle layer of {ENCODER}: faster than the base"
    )


def chosen_spec(
    settings: EmbedderSettings, base: BaseSpec, path: Path, dtype: str
) -> tuple[EmbedderSpec, str]:
    """Return the spec of the configured embedder, and the reason if ``chosen`` resolved kind "auto".

    Parameters
    ----------
    path : the directory of ``base``.
    dtype : data type of the base's weights.
    """
    wanted, why = chosen(settings, path)
    if wanted.model is None:
        spec = embedder_spec(
            "base", base.model, wanted.max_tokens, dtype, wanted.layer, base.revision, pooling=wanted.pooling
        )
    else:
        options = wanted.model, wanted.max_tokens, "float32", wanted.layer
        spec = embedder_spec(wanted.kind, *options, url=wanted.url, pooling=wanted.pooling)
    return spec, why


def embedder_spec(
    kind: str,
    model: str,
    max_tokens: int,
    dtype: str,
    layer: Literal["middle", "last"] | int = "middle",
    revision: str | None = None,
    url: str | None = None,
    pooling: str = "unit",
) -> EmbedderSpec:
    """Return an embedder's spec from its config, without loading weights.

    Parameters
    ----------
    url : address of an embedder of kind endpoint, which is asked for one vector.

    Raises
    ------
    ConfigError
        If the model has fewer layers than ``layer``.
    """
    if url is not None:
        return endpoint_spec(model, max_tokens, url)
    from transformers import AutoConfig

    path = resolve_base(model, revision)
    config = AutoConfig.from_pretrained(str(path)).get_text_config()
    layers = config.num_hidden_layers
    chosen = layer if isinstance(layer, int) else layers if layer == "last" else layers // 2
    if chosen > layers:
        raise ConfigError(f"embedder.layer {chosen}: {model} has {layers} layers")
    sentence = kind == "sentence-transformers"
    return EmbedderSpec(
        kind=kind,
        model=model,
        layer=layers if sentence else chosen,
        max_tokens=max_tokens,
        dtype=dtype,
        dim=_sentence_dim(path) if sentence else config.hidden_size,
        fingerprint=base_fingerprint(path),
        pooling=pooling,
    )


def load_embedder(
    spec: EmbedderSpec, base: BaseSpec, base_path: Path | None = None, url: str | None = None
) -> Embedder:
    """Load the embedder that a bundle records.

    Parameters
    ----------
    base_path : directory of the base model; default: the one that the bundle records.
    url : address of an embedder of kind endpoint.

    Raises
    ------
    ConfigError
        If ``url`` is missing for kind endpoint, or given for another kind.
    ModelError
        If the model cannot be found or loaded, or its config or tokenizer differs from the recorded one.
    """
    _check_address(spec, url)
    if url is not None:
        return EndpointEmbedder(spec, url)
    path = find_model(spec, base, base_path)
    if spec.kind == "sentence-transformers":
        return SentenceEmbedder(path, spec)
    import torch
    from transformers import AutoModel, AutoTokenizer

    quieten()
    try:
        model = AutoModel.from_pretrained(str(path), dtype=getattr(torch, spec.dtype))
        tokenizer = AutoTokenizer.from_pretrained(str(path))
    except (OSError, ValueError) as error:
        raise ModelError(f"embedder {path} does not load: {first_line(error)}") from error
    return HiddenStateEmbedder(model.eval(), tokenizer, spec, owned=True)


def find_model(spec: EmbedderSpec, base: BaseSpec, base_path: Path | None = None) -> Path:
    """Return the directory of an embedder's model, checked but not loaded; see ``load_embedder``."""
    _check_address(spec, None)
    if spec.kind == "base":
        path = base_path or resolve_base(base.model, base.revision)
    else:
        path = resolve_base(spec.model)
    if base_fingerprint(path) != spec.fingerprint:
        raise ModelError(
            f"embedder {spec.model}: config or tokenizer in {path} differ from those used in training; "
            "serve with the same embedder or train again"
        )
    return path


def _check_address(spec: EmbedderSpec, url: str | None) -> None:
    if spec.kind == ENDPOINT and url is None:
        raise ConfigError(f"embedder {spec.model} is an endpoint: give its address with --embedder-url")
    if spec.kind != ENDPOINT and url is not None:
        raise ConfigError(
            f"embedder {spec.model} is of kind {spec.kind}, not an endpoint: remove --embedder-url"
        )


def probe(embedder: Embedder) -> Array:
    """Embed the fixed probe texts: (3, d) float32."""
    return embedder.embed(PROBE_TEXTS)


def _drop_blocks(model: "torch.nn.Module", layer: int) -> "torch.nn.Module | None":
    """Remove a model's blocks above ``layer``; return the block that outputs that layer's hidden state.

    Does nothing and returns None for the last layer, whose state is normalised, and for a model whose list of
    blocks is not found.
    """
    import torch

    num: int = model.config.get_text_config().num_hidden_layers  # type: ignore[operator, union-attr]
    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == num]
    if len(lists) != 1 or not 0 < layer < num:
        return None
    del lists[0][layer:]
    return lists[0][-1]


def _traced(
    forward: "Callable[[torch.Tensor, torch.Tensor], torch.Tensor]", device: "torch.device", longest: int
) -> "Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None":
    """Trace ``forward`` into a graph, without Python between its operations; None if its output differs.

    In a small model most of the time is Python's, and each of its steps competes with a busy event loop.

    Parameters
    ----------
    forward : (B, T) token ids and (B,) lengths → (B, d).
    longest : tokens of the longest text, because windowed attention differs only beyond its window.
    """
    import torch

    def rows(num: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.arange(num * width, device=device).reshape(num, width) % 50
        return ids, torch.arange(width, width - num, -1, device=device)

    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # the comparison below finds values wrongly traced as constants
        try:
            graph: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = torch.jit.trace(
                forward, rows(2, 9), check_trace=False
            )
            same = [
                torch.allclose(graph(*x), forward(*x), atol=1e-5)
                for x in (rows(1, 1), rows(1, 5), rows(3, 17), rows(1, longest))
            ]
        except (IndexError, RuntimeError, TypeError, ValueError):  # forward works without a graph
            return None
    return graph if all(same) else None


def _batches(lengths: Sequence[int]) -> list[list[int]]:
    """Group row numbers by length, shortest first; skip rows of length 0.

    A group has at most ``BATCH_TOKENS`` padded tokens. Its longest row is at most ``MAX_PADDING`` longer than
    its shortest.
    """
    groups: list[list[int]] = [[]]
    for row in sorted((r for r, n in enumerate(lengths) if n), key=lambda r: (lengths[r], r)):
        group, width = groups[-1], lengths[row]
        full = (len(group) + 1) * width > BATCH_TOKENS
        if group and (full or width > (1 + MAX_PADDING) * lengths[group[0]]):
            groups.append([])
        groups[-1].append(row)
    return [group for group in groups if group]


def _sentence_dim(path: Path) -> int:
    from fedrouter.models import read_json

    pooling = sorted(path.glob("*_Pooling/config.json"))
    if pooling:
        config = read_json(pooling[0])
        dim = config.get("word_embedding_dimension", config.get("embedding_dimension"))
        if isinstance(dim, int):
            return dim
    return int(read_json(path / "config.json")["hidden_size"])
