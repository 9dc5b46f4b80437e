"""The hybrid on one page: an embedding, layers of `x + mixer(norm(x))`, a norm and a head.

    logits = model(tokens, state)

Modules carry the published names (`backbone.layers.7.mixer.q_proj.weight`), so a published checkpoint needs no map.
Source: arXiv:2504.03624, section 2.1.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemotron_h.config.model import AttentionConfig, LayerConfig, MambaConfig, MlpConfig, ModelConfig
from nemotron_h.errors import ShapeError, UnsupportedError
from nemotron_h.grid import ROWS
from nemotron_h.model.attention import Attention
from nemotron_h.model.linear import Linear, QuantizedLinear
from nemotron_h.model.mamba import Gain, Mamba, Taps
from nemotron_h.model.mlp import Mlp
from nemotron_h.model.state import AttentionState, MambaState, Paging, State
from nemotron_h.ops.linear import linear
from nemotron_h.ops.norm import rms_norm
from nemotron_h.ops.rows import add, pick
from nemotron_h.ops.segments import Segments
from nemotron_h.ops.shapes import wants_gradient


class Hybrid(nn.Module):
    """A Nemotron-H model. Weights are empty until they are initialised (`init.py`) or loaded.

    dtype: of the weights (the Mamba layers' A_log, D and dt_bias are float32 always); compute_dtype: of the products
    and of the residual stream, by default the weights'. float32 weights with bfloat16 products are how it is trained.

    row_multiple: what a call's rows are padded to, for a row's bits to be its own; `check.start_up` finds it.
    """

    row_multiple: int = ROWS

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: torch.dtype = torch.float32,
        compute_dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        device = torch.device(device)
        self.config = config
        self.compute_dtype = compute_dtype or dtype
        for name, given in (("dtype", dtype), ("compute_dtype", self.compute_dtype)):
            if given not in (torch.float32, torch.bfloat16):
                raise UnsupportedError(f"{name}: must be torch.float32 or torch.bfloat16; got {given}")
        self.backbone = Backbone(config, dtype=dtype, device=device)
        self.lm_head: Linear | QuantizedLinear | None = None  # where it is tied: the embedding, unless it is quantised
        if not config.tied_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, dtype=dtype, device=device)

    def forward(self, tokens: Tensor, state: State | None = None, *, documents: Tensor | None = None) -> Tensor:
        """Logits (b, l, vocab), float32, of tokens (b, l) int64.

        state: what came before each of the b sequences; it moves on by l tokens. documents: (b, l), for packed
        sequences, constant along a document; each document is computed as if it stood alone.
        """
        batch, length = tokens.shape
        segments = self.segments(tokens, state, documents)
        hidden = self.hidden(tokens.flatten(), segments, state)
        return self.logits(hidden)[: segments.tokens].view(batch, length, -1)

    def segments(self, tokens: Tensor, state: State | None = None, documents: Tensor | None = None) -> Segments:
        """Which rows of the call belong together: tokens (b, l), the rest as in `forward`."""
        batch, length = tokens.shape
        if documents is not None:
            if state is not None:
                raise ShapeError("documents: must not be given with a state; pack only whole documents")
            if documents.shape != tokens.shape:
                raise ShapeError(f"documents: must have shape {tuple(tokens.shape)}; got {tuple(documents.shape)}")
            return Segments.of_documents(documents, multiple=self.row_multiple)
        if state is not None:
            return state.segments([length] * batch, self.row_multiple)
        return Segments.of_batch(batch, length, multiple=self.row_multiple)

    def hidden(
        self, tokens: Tensor, segments: Segments, state: State | None = None, rows: Tensor | None = None
    ) -> Tensor:
        """What the head reads, (rows, hidden): tokens (segments.tokens,) int64. The state moves on.

        rows (k,) int64, k a multiple of row_multiple: of these alone, (k, hidden). From the output projection of the
        last layer in which a row reads others, the rest is not computed.
        """
        multiple = self.row_multiple
        for what, count in (("rows", len(rows) if rows is not None else 0), ("segments.rows", segments.rows)):
            if count % multiple:
                raise ShapeError(
                    f"{what}: must be a multiple of {multiple}, for their bits to be their own; got {count}"
                )
        if state is None and any(segments.starts):
            raise ShapeError(f"state: must hold what lies before the tokens, which begin at {max(segments.starts)}")
        if state is not None:
            if torch.is_grad_enabled() and wants_gradient(*self.parameters()):
                raise ShapeError("state: must be None where gradients are wanted; got a state; use torch.no_grad()")
            state.enter()
        paging = Paging.of(state.tables, segments) if state is not None else Paging.alone(segments)
        ids = F.pad(tokens, (0, segments.rows - segments.tokens))
        x = self.through(ids, segments, state, paging, rows)
        if state is not None:
            state.advance(segments)
        return x

    def through(
        self, ids: Tensor, segments: Segments, state: State | None, paging: Paging, rows: Tensor | None = None
    ) -> Tensor:
        """What `hidden` gives, of ids (segments.rows,): the layers, whose states are written to, and the last norm."""
        x = pick(self.backbone.embeddings.weight, ids, self.compute_dtype)
        last = self.last_mixing
        for index, layer in enumerate(self.backbone.layers):
            wanted = rows if index == last else None
            x = layer(x, segments, state.layers[index] if state is not None else None, paging, wanted)
        return self.backbone.norm_f(x)  # type: ignore[no-any-return]

    def logits(self, hidden: Tensor) -> Tensor:
        """(rows, hidden) -> (rows, vocab) float32. Rows in a multiple of row_multiple have bits of their own."""
        return self.head(hidden).float()

    def head(self, hidden: Tensor) -> Tensor:
        """The same as the product gives it: in hidden's dtype, or of a head in integers in float32."""
        match self.lm_head:
            case QuantizedLinear() as head:
                return head(hidden, torch.float32)  # type: ignore[no-any-return]
            case Linear() as head:
                return head(hidden)  # type: ignore[no-any-return]
            case _:
                return linear(hidden, self.backbone.embeddings.weight)

    @property
    def last_mixing(self) -> int:
        """The last layer in which a row reads others; the first where there is none."""
        layers = enumerate(self.config.layers)
        return max((index for index, layer in layers if not isinstance(layer, MlpConfig)), default=0)

    @property
    def layers(self) -> list["Layer"]:
        return list(self.backbone.layers)  # type: ignore[arg-type]

    @property
    def device(self) -> torch.device:
        return self.backbone.embeddings.weight.device

    @property
    def head_weight(self) -> nn.Parameter:
        """(vocab, hidden): the head's own, or the embedding's where they are tied. Raises: UnsupportedError."""
        match self.lm_head:
            case Linear() as head:
                return head.weight
            case None:
                return self.backbone.embeddings.weight
            case _:
                raise UnsupportedError("head_weight: must be plain; it is quantised; load the model in bfloat16")

    @property
    def matrices(self) -> dict[str, Linear | QuantizedLinear]:
        """Every matrix by its module's name; a tied head is not among them, unless it is quantised."""
        found = self.named_modules()
        return {name: module for name, module in found if isinstance(module, Linear | QuantizedLinear)}

    @property
    def keys_values(self) -> torch.dtype | None:
        """int8 where keys and values are kept so; None: in the dtype of the products. Set it before the first state."""
        return next((one.keys_values for one in self.modules() if isinstance(one, Attention)), None)

    @keys_values.setter
    def keys_values(self, dtype: torch.dtype | None) -> None:
        if dtype not in (None, torch.int8):
            raise UnsupportedError(f"keys_values: must be torch.int8, or None; got {dtype}")
        attention = [one for one in self.modules() if isinstance(one, Attention)]
        if dtype is not None and not attention:
            raise UnsupportedError("keys_values: must be None in a model without attention; it keeps none")
        for one in attention:
            one.keys_values = dtype

    @property
    def precision(self) -> str:
        """float32 or bfloat16, or int8 or int4, of the matrices of the layers."""
        of_layers = (one for name, one in self.matrices.items() if name.startswith("backbone."))
        bits = [one.bits for one in of_layers if isinstance(one, QuantizedLinear)]
        return f"int{bits[0] if bits else 8}" if self.quantized else str(self.compute_dtype).removeprefix("torch.")

    @property
    def quantized(self) -> bool:
        """Are all matrices in integers, the head too?"""
        return all(isinstance(one, QuantizedLinear) for one in (*self.matrices.values(), self.lm_head))

    @property
    def takes_any_rows(self) -> bool:
        """Do kernels of ours multiply few rows by each matrix, the head too? They cannot tell how many there are."""
        return all(
            isinstance(one, QuantizedLinear) or (isinstance(one, Linear) and one.kernel is not None)
            for one in (*self.matrices.values(), self.lm_head)
        )

    def put(self, name: str, matrix: QuantizedLinear) -> None:
        """Put a matrix in integers in the place of the one of that name in `matrices`, or of the head, lm_head."""
        owner, _, leaf = name.rpartition(".")
        setattr(self.get_submodule(owner), leaf, matrix)

    def pack(self) -> None:
        """Lay every matrix, and every conv's taps, out for reading, in place; it is then not trained any more."""
        done: dict[tuple[int, int], Linear] = {}
        for module in self.modules():
            if isinstance(module, Linear):
                module.pack(done.get(module.shape))
                done.setdefault(module.shape, module)
            elif isinstance(module, Taps):
                module.pack()

    def empty_state(self, batch: int) -> State:
        """A state before the first token of so many sequences."""
        dtype, keys_values = self.compute_dtype, self.keys_values
        return State.zeros(self.config, batch, dtype=dtype, keys_values=keys_values, device=self.device)


class Backbone(nn.Module):
    def __init__(self, config: ModelConfig, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.embeddings = Table(config.vocab_size, config.hidden_size, dtype=dtype, device=device)
        self.layers = nn.ModuleList(
            Layer(layer, config.hidden_size, config.norm_epsilon, dtype=dtype, device=device) for layer in config.layers
        )
        self.norm_f = Norm(config.hidden_size, config.norm_epsilon, dtype=dtype, device=device)


class Layer(nn.Module):
    """x + mixer(norm(x)), the mixer being what the config says."""

    def __init__(
        self, config: LayerConfig, hidden_size: int, epsilon: float, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.norm = Norm(hidden_size, epsilon, dtype=dtype, device=device)
        self.mixer: Mamba | Attention | Mlp
        match config:
            case MambaConfig():
                self.mixer = Mamba(config, hidden_size, epsilon, dtype=dtype, device=device)
            case AttentionConfig():
                self.mixer = Attention(config, hidden_size, dtype=dtype, device=device)
            case MlpConfig():
                self.mixer = Mlp(config, hidden_size, dtype=dtype, device=device)

    def forward(
        self,
        x: Tensor,
        segments: Segments,
        state: MambaState | AttentionState | None,
        paging: Paging,
        rows: Tensor | None = None,
    ) -> Tensor:
        """rows (k,): of these alone, (k, hidden); None: of all."""
        u = self.norm(x)
        mixed: Tensor
        match self.mixer, state:
            case Mamba() as mamba, MambaState() | None:
                mixed = mamba(u, segments, state, rows)
            case Attention() as attention, AttentionState() | None:
                mixed = attention(u, segments, state, paging, rows)
            case Mlp() as mlp, None:
                mixed = mlp(u if rows is None else u[rows])
            case mixer, other:
                raise ShapeError(
                    f"state: must be of the model's own layers; got {type(other).__name__} for {type(mixer).__name__}"
                )
        return add(x if rows is None else x[rows], mixed)


class Norm(Gain):
    """RMSNorm with its gain rounded to the stream's dtype: a checkpoint saved in that dtype computes the same bits."""

    def __init__(self, channels: int, epsilon: float, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(channels, dtype=dtype, device=device)
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight.to(x.dtype), self.epsilon)


class Table(nn.Module):
    """The embedding (vocab, hidden)."""

    def __init__(self, rows: int, columns: int, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns, dtype=dtype, device=device))
