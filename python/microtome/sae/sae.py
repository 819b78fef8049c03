"""The sparse autoencoder."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from microtome import _check
from microtome._seed import generator
from microtome.errors import ArgumentError, DtypeError, ShapeError
from microtome.ops import Screen, sae_loss, screen_weights, sparse_decode, topk_encode
from microtome.ops.screen_weights import has_screen
from microtome.sae import saelens_layout
from microtome.sae.code import SparseCode


@dataclass(frozen=True)
class TopK:
    """Keep the k largest pre-activations of a row, then apply the ReLU.

    Attributes:
        k: how many, a whole number of at least 1; the SAE has at least so many features.

    Raises:
        ArgumentError: k is below 1 or no whole number.

    Source: Gao et al. 2024, arXiv:2406.04093.
    """

    k: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "k", _check.whole("TopK", "k", self.k))
        if self.k < 1:
            msg = f"TopK: k must be at least 1, got k={self.k}."
            raise ArgumentError(msg)


def version_of(tensor: Tensor) -> tuple[object, ...]:
    """What changes when a tensor is written to, other than through `.data`, or replaced."""
    return weakref.ref(tensor), tensor.data_ptr(), tensor._version


class SAE(nn.Module):
    """A sparse autoencoder: an activation vector as a few features out of many.

        values, indices = TopK((x - b_dec) W_enc^T + b_enc)
        x_hat = b_dec + sum_j values_j W_dec[indices_j]

    Args:
        d_model: d, width of the activations.
        n_features: f, how many features.
        activation: TopK(k).
        center: subtract b_dec from x before encoding, as above; False leaves x as it is.
        seed: of the initial weights: decoder rows uniform on the unit sphere, the encoder a copy of
            the decoder, biases zero. None leaves all weights zero, to be filled by the caller.

    Parameters, float32: W_enc [f, d], b_enc [f], W_dec [f, d] with rows of length 1, b_dec [d].

    Raises:
        ArgumentError: a size below 1, k above f, or an activation that is not TopK.

    A feature that fires is one direction the dictionary found useful for reconstruction; it does
    not follow that the model uses it, nor that another dictionary would have it.

    Example:
        >>> import torch
        >>> sae = SAE(d_model=8, n_features=32, activation=TopK(4))
        >>> code = sae.encode(torch.ones(2, 3, 8))
        >>> code.shape, sae.decode(code).shape
        ((2, 3, 32), torch.Size([2, 3, 8]))
    """

    def __init__(
        self,
        d_model: int,
        n_features: int,
        activation: TopK,
        *,
        center: bool = True,
        seed: int | None = 0,
    ) -> None:
        super().__init__()
        if not isinstance(activation, TopK):
            msg = f"SAE: activation must be TopK(k), got {activation!r}."
            raise ArgumentError(msg)
        d_model = _check.whole("SAE", "d_model", d_model)
        n_features = _check.whole("SAE", "n_features", n_features)
        _check.between("SAE", "d_model", d_model, 1, 2**31 - 1)
        _check.between("SAE", "n_features", n_features, 1, 2**31 - 1)
        _check.between("SAE", "k", activation.k, 1, n_features, "n_features")
        self.d_model, self.n_features = d_model, n_features
        self.activation, self.center = activation, center
        if seed is None:
            W_dec = torch.zeros(n_features, d_model)
        else:
            W_dec = torch.randn(n_features, d_model, generator=generator(seed, "SAE", "W_dec"))
            W_dec /= W_dec.norm(dim=1, keepdim=True).clamp_min(1e-30)
        self.W_enc = nn.Parameter(W_dec.clone())
        self.b_enc = nn.Parameter(torch.zeros(n_features))
        self.W_dec = nn.Parameter(W_dec)
        self.b_dec = nn.Parameter(torch.zeros(d_model))
        self.drop_screen()

    def extra_repr(self) -> str:
        """What `print` shows."""
        center = "" if self.center else ", center=False"
        return f"d_model={self.d_model}, n_features={self.n_features}, {self.activation}{center}"

    def encode(self, x: Tensor) -> SparseCode:
        """The active features of x.

        Args:
            x: [..., d], any floating dtype; it is cast to the weights' dtype.

        Returns:
            A SparseCode of k entries a row, values after the ReLU, in order of value, leading shape
            as of x.

        Raises:
            DtypeError: x is no tensor of floats.
            ShapeError: the last dimension is not d.
            NonFiniteError: x holds NaN or infinity; the message names the rows.

        Differentiable in x and the parameters. Exact and deterministic; see `topk_encode`.
        """
        if not isinstance(x, Tensor):
            msg = f"SAE.encode: x must be a tensor [..., d={self.d_model}], got "
            msg += f"{type(x).__name__}. Make one with torch.as_tensor."
            raise DtypeError(msg)
        _check.dtype("SAE.encode", _check.FLOATS, x=x)
        if x.dim() == 0 or x.shape[-1] != self.d_model:
            msg = f"SAE.encode: x must be [..., d={self.d_model}], got shape {list(x.shape)}."
            raise ShapeError(msg)
        rows = x.reshape(-1, self.d_model).to(self.W_enc.dtype)
        b_dec = self.b_dec if self.center else None
        values, indices, _ = topk_encode(
            rows, self.W_enc, self.b_enc, b_dec, k=self.activation.k, screen=self.screen()
        )
        return SparseCode(values.relu(), indices, self.n_features, None, tuple(x.shape[:-1]))

    def decode(self, code: SparseCode) -> Tensor:
        """The activations that a code stands for, [*leading, d] in the weights' dtype.

        Raises:
            ArgumentError: it is no SparseCode.
            ShapeError: the code has another number of features.
        """
        if not isinstance(code, SparseCode):
            msg = f"SAE.decode: code must be a SparseCode, got {type(code).__name__}. "
            msg += "SAE.encode makes one."
            raise ArgumentError(msg)
        if code.n_features != self.n_features:
            msg = f"SAE.decode: the code must have f={self.n_features} features, got "
            msg += f"{code.n_features}."
            raise ShapeError(msg)
        values, indices = code.padded()
        out = sparse_decode(values.to(self.W_dec.dtype), indices, self.W_dec, self.b_dec)
        return out.reshape(*code.shape[:-1], self.d_model)

    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction of x, [..., d] in the weights' dtype."""
        return self.decode(self.encode(x))

    def squared_errors(self, x: Tensor, code: SparseCode) -> Tensor:
        """|x - x_hat|^2 of rows [n, d] and their code of k entries a row, [n], in one pass."""
        sse, _, _ = sae_loss(x, code.values, code.indices, self.W_dec, self.b_dec)
        return sse

    @property
    def parameters_in_order(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """W_enc, b_enc, W_dec, b_dec: the order that `sae_update` takes."""
        return self.W_enc, self.b_enc, self.W_dec, self.b_dec

    @torch.no_grad()
    def normalize_decoder_(self) -> None:
        """Scale every decoder row to length 1, in place."""
        self.W_dec /= self.W_dec.norm(dim=1, keepdim=True).clamp_min(1e-30)

    @torch.no_grad()
    def project_decoder_gradient_(self) -> None:
        """Remove from W_dec.grad its component along each decoder row, in place.

        grad[g] -= <grad[g], W_dec[g]> / |W_dec[g]|^2 * W_dec[g]
        """
        grad = self.W_dec.grad
        if grad is None:
            msg = "SAE.project_decoder_gradient_: W_dec has no gradient; call backward first."
            raise ArgumentError(msg)
        along = (grad * self.W_dec).sum(1) / self.W_dec.square().sum(1).clamp_min(1e-30)
        grad.addcmul_(along[:, None], self.W_dec, value=-1)

    def screen(self) -> Screen | None:
        """The encoder's cached shadow, rebuilt when W_enc has changed; None where there is none.

        A change is seen through the tensor's address and version counter. Writing through
        `W_enc.data` moves neither: call `drop_screen()` after it.
        """
        if torch.compiler.is_compiling():  # first: a graph cannot ask whether W is for inference
            return None
        W = self.W_enc
        if not has_screen(W.device, W.dtype) or W.is_inference():
            return None
        if self._screen is None or self._screen_key != version_of(W):
            self.keep_screen(screen_weights(W.detach()))
        return self._screen

    def keep_screen(self, screen: Screen | None) -> None:
        """Declare `screen` to be the shadow of W_enc as it is now, as `sae_update` leaves it."""
        self._screen = screen
        self._screen_key = None if screen is None else version_of(self.W_enc)

    def drop_screen(self) -> None:
        """Forget the cached shadow."""
        self._screen: Screen | None = None
        self._screen_key: tuple[object, ...] | None = None

    def _apply(self, *args: Any, **kwargs: Any) -> SAE:
        self.drop_screen()  # .to(), .half() and the like swap the storage under the parameter
        super()._apply(*args, **kwargs)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_screen": None, "_screen_key": None}

    def save_pretrained(
        self, path: str | Path, metadata: Mapping[str, object] | None = None
    ) -> None:
        """Write cfg.json and sae_weights.safetensors, the layout that sae-lens itself loads.

        Args:
            path: a folder, made if absent. Other files in it are left alone.
            metadata: kept under "metadata" in cfg.json, JSON values only (model_name, hook_name,
                ...).

        Raises:
            CheckpointError: the folder cannot be written; files that stood there are intact.
            NonFiniteError: the weights hold NaN or infinity.
        """
        saelens_layout.write(
            Path(path),
            self.parameters_in_order,
            self.activation.k,
            self.center,
            dict(metadata or {}),
        )

    @classmethod
    def from_pretrained(cls, path: str | Path) -> SAE:
        """Read a TopK SAE in the SAELens layout, ours or SAELens's own, as float32 on the CPU.

        Args:
            path: a folder with cfg.json and sae_weights.safetensors.

        Returns:
            An SAE. Where SAELens rescales activations by the decoder's norms, they are folded into
            the weights.

        Raises:
            CheckpointError: a file is missing, truncated, corrupt or holds NaN, or the SAE is of a
                kind that TopK cannot express; the message says which.

        Reads JSON and safetensors only; nothing is ever unpickled.
        """
        read = saelens_layout.read(Path(path))
        f, d = read.W_enc.shape
        sae = cls(d, f, TopK(read.k), center=read.center, seed=None)
        with torch.no_grad():
            for parameter, tensor in zip(sae.parameters_in_order, read.tensors, strict=True):
                parameter.copy_(tensor)
        return sae
