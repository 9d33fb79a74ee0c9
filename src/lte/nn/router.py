"""Routers: which experts run for which token. An expert may be a single neuron."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lte.errors import CheckpointError, ConfigError
from lte.nn.routing import ConstantForm, Form, LinearForm, RouterCost, Routing
from lte.ops.reference import expert_scores

if TYPE_CHECKING:
    from lte.nn.ffn import SparseFFN

ROUTER_DTYPE = torch.float32
"""Of every router's parameters, whatever the model's. A router's learning rate falls with its width: at 4096 a step is
below half a unit in the last place of a typical bf16 weight, and most steps would round to nothing."""


LOGIT_RANGE = 20.0
"""Furthest a threshold may move, in logits: as low as that, it leaves nothing out."""

FINE_RANGE = 500
"""Furthest the second threshold may lie, in logits: further, its exponential is no number."""


def read_thresholds(state: Tensor) -> tuple[float, float | None, float]:
    """:attr:`Router.threshold`, :attr:`Router.fine` and :attr:`Router.fine_share` from a state dict's entry.

    Raises:
        CheckpointError: it is of another shape or type, or a number is out of its range.
    """
    if not isinstance(state, Tensor) or state.dtype != torch.int64 or state.shape != (3,):
        shown = f"{state.dtype}, {list(state.shape)}" if isinstance(state, Tensor) else repr(state)
        raise CheckpointError(f"a router's thresholds are three numbers of int64, not {shown}")
    threshold, fine, share = state.cpu().view(torch.float64).tolist()
    if not 0 < threshold < 1:
        raise CheckpointError(f"threshold={threshold} of a router must lie between 0 and 1")
    if abs(fine) > FINE_RANGE:
        raise CheckpointError(f"fine={fine} of a router must lie between -{FINE_RANGE} and {FINE_RANGE}")
    if not 0 <= share <= 1:
        raise CheckpointError(f"fine_share={share} of a router must lie between 0 and 1")
    return threshold, None if math.isnan(fine) else fine, share


def uncast(x: Tensor) -> AbstractContextManager[Any]:
    """Without autocast, which the meta device does not know."""
    return nullcontext() if x.is_meta else torch.autocast(device_type=x.device.type, enabled=False)


class Router(nn.Module):
    """What decides which experts of an FFN run for a token.

    A method brings one per FFN. It gets the FFN's inputs; what else it looks at (weights, gate activations, a predictor
    of its own) it reaches through the FFN it is attached to. Parameters and buffers of its own are saved, trained and
    kept in float32 as they are, under ``.router.`` in the state dict.

    Args:
        n_experts: number of experts E, each of d_ff / E neighbouring neurons.
        threshold: tau, in (0, 1).

    Attributes:
        threshold: the same; saved with ``fine`` and ``fine_share`` in the state dict, under ``.router._extra_state``.
        fine: logit above which an expert that runs does so on all bits, where weights lie in two planes; None: all do.
        fine_share: of those that run, on the text that this was found on.
    """

    uses_threshold = True
    """Whether moving ``threshold`` changes which experts run."""

    decides = True
    """False where all neurons that the FFN has run for every token."""

    def __init__(self, n_experts: int, *, threshold: float = 0.5) -> None:
        super().__init__()
        self.n_experts = n_experts
        self.threshold = threshold
        self.fine: float | None = None
        self.fine_share = 1.0

    def get_extra_state(self) -> Tensor:
        """[3] int64, of the state dict: the bits of three float64 numbers, which no cast of a model rounds.

        They are :attr:`threshold`, :attr:`fine` (a NaN for None) and :attr:`fine_share`.
        """
        numbers = (self.threshold, math.nan if self.fine is None else self.fine, self.fine_share)
        return torch.tensor(numbers, dtype=torch.float64, device="cpu").view(torch.int64)

    def set_extra_state(self, state: Tensor) -> None:
        """Take the thresholds of a state dict over; CheckpointError where they are none."""
        self.threshold, self.fine, self.fine_share = read_thresholds(state)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """What ``.to()``, ``.half()``, ``.cuda()``, ... go through: the device changes, dtype and values do not."""

        def keep(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep, recurse)

    def attach(self, ffn: SparseFFN) -> None:
        """Called once, with the FFN whose experts are decided on, to be kept: nothing of it is ready to be read yet."""

    def freeze(self) -> None:
        """Take what is not learned out of training; called when weights were loaded, which makes all learnable."""

    @abstractmethod
    def forward(self, x: Tensor) -> Routing:
        """Decide for inputs of shape [..., D]."""

    def inputs(self, x: Tensor) -> Tensor:
        """What the FFN's first matrices get for an input: the input, unless parts of it are left out."""
        return x

    def form(self) -> Form | None:
        """How kernels can decide by themselves; None where they have to be given the mask."""
        return None

    @abstractmethod
    def cost(self) -> RouterCost:
        """What deciding takes."""

    @property
    def cut(self) -> float:
        """The threshold, in logits."""
        return math.log(self.threshold / (1 - self.threshold))

    @property
    def runs_all(self) -> bool:
        """Whether the threshold is as low as one goes: every expert runs, and nobody need ask."""
        return self.cut <= -LOGIT_RANGE + 1e-9  # it was a probability in between

    def decide(self, logits: Tensor) -> Routing:
        """Scores and mask from float32 logits, [..., E], and the threshold."""
        margins, mask = logits - self.cut, torch.sigmoid(logits) > self.threshold
        return Routing(torch.sigmoid(margins), torch.ones_like(mask) if self.runs_all else mask, margins)

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"n_experts={self.n_experts}, threshold={self.threshold}"


class ThresholdRouter(Router):
    """``G(x) = sigmoid(x W_g + b - logit(threshold))``; an expert runs where ``G(x) > 0.5`` (LTE, section 4.1).

    The paper's threshold is 0.5 and stays there; moving ``threshold`` moves all of a router's scores against it.

    Scores are always computed in float32, under autocast too: near the threshold bf16 has steps of 0.004, and a
    mask that depends on the dtype cannot be reproduced. So are the parameters, and they stay so when the model is cast.

    Args:
        d_model: width D of the FFN's input.
        n_experts: number of experts E.
        threshold: tau, in (0, 1).
        bias: whether the router has a bias (the paper's equation has none).
        init_std: standard deviation of the initial logits over inputs of unit variance.
        init_score: mean initial score, set through the bias; 0.5 without a bias.
    """

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        *,
        threshold: float = 0.5,
        bias: bool = True,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(n_experts, threshold=threshold)
        self.weight = nn.Parameter(torch.empty(n_experts, d_model, device=device, dtype=ROUTER_DTYPE))
        self.bias = nn.Parameter(torch.empty(n_experts, device=device, dtype=ROUTER_DTYPE)) if bias else None

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator, *, init_std: float, init_score: float) -> None:
        """Draw the weights on the CPU, so that every device starts from the same router.

        Args:
            generator: CPU generator.
            init_std: standard deviation of the logits for inputs whose entries have unit variance.
            init_score: score of a zero input; needs a bias unless it is 0.5.
        """
        n_experts, d_model = self.weight.shape
        self.weight.copy_(torch.randn(n_experts, d_model, generator=generator) * (init_std / d_model**0.5))
        if self.bias is not None:
            self.bias.fill_(torch.logit(torch.tensor(init_score)).item())

    def form(self) -> LinearForm | ConstantForm | None:
        """See :meth:`Router.form`; of this class alone, what derives from it may compute anything."""
        if type(self) is not ThresholdRouter:
            return None
        return ConstantForm() if self.runs_all else LinearForm(self.weight, self.bias, self.threshold)

    def cost(self) -> RouterCost:
        """See :meth:`Router.cost`."""
        return RouterCost.of_layers(self.parameters())

    def logits(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., E], in float32."""
        bias = None if self.bias is None else self.bias.float()
        return F.linear(x.float(), self.weight.float(), bias)

    def forward(self, x: Tensor) -> Routing:
        """Route inputs of shape [..., D]."""
        with uncast(x):
            return self.decide(self.logits(x))

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"d_model={self.weight.shape[1]}, {super().extra_repr()}, bias={self.bias is not None}"


class LowRankRouter(ThresholdRouter):
    """Two layers with a ReLU between them, ``sigmoid(relu(x A) B + b)``: the form of Deja Vu's predictor.

    Args:
        d_model, n_experts, threshold, bias, device: as for :class:`ThresholdRouter`.
        rank: width of the layer between.
    """

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        *,
        rank: int,
        threshold: float = 0.5,
        bias: bool = True,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(rank, n_experts, threshold=threshold, bias=bias, device=device)
        self.reduce = nn.Parameter(torch.empty(rank, d_model, device=device, dtype=ROUTER_DTYPE))

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator, *, init_std: float, init_score: float) -> None:
        """See :meth:`ThresholdRouter.reset_parameters`; the hidden layer keeps unit variance."""
        super().reset_parameters(generator, init_std=init_std, init_score=init_score)
        d_model = self.reduce.shape[1]
        self.reduce.copy_(torch.randn(self.reduce.shape, generator=generator) * (2 / d_model) ** 0.5)

    def logits(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., E], in float32."""
        bias = None if self.bias is None else self.bias.float()
        return F.linear(F.linear(x.float(), self.reduce.float()).relu(), self.weight.float(), bias)


def largest(scores: Tensor, k: int) -> Tensor:
    """Which along the last dimension are the k largest; bool."""
    chosen = scores.topk(k, dim=-1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, chosen, True)


class LookingRouter(Router):
    """A router that looks at its FFN; what else it has is fitted, never learned."""

    def __init__(self, n_experts: int, *, threshold: float = 0.5) -> None:
        super().__init__(n_experts, threshold=threshold)
        self._ffn: list[SparseFFN] = []

    def attach(self, ffn: SparseFFN) -> None:
        """See :meth:`Router.attach`."""
        self._ffn = [ffn]  # in a list it is no child of its own child

    @property
    def ffn(self) -> SparseFFN:
        """The FFN whose experts are decided on."""
        return self._ffn[0]

    def freeze(self) -> None:
        """See :meth:`Router.freeze`."""
        self.requires_grad_(False)


class FixedShareRouter(LookingRouter):
    """The experts with the largest scores run, as many for every token. Sub-classes score.

    Args:
        n_experts: number of experts E.
        sparsity: share of them that does not run; one always runs.
        bank: of so many neighbours each, the largest run; None for one bank of all. Divides E.
    """

    uses_threshold = False

    def __init__(self, n_experts: int, *, sparsity: float, bank: int | None = None) -> None:
        super().__init__(n_experts)
        self.bank = n_experts if bank is None else bank
        if n_experts % self.bank:
            raise ConfigError(f"bank={bank} does not divide the {n_experts} experts of an FFN")
        self.k = max(1, round(self.bank * (1 - sparsity)))

    @abstractmethod
    def scores(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., E], or of every neuron, [..., F]; of an expert's the norm counts."""

    def gates(self, scores: Tensor) -> Tensor | None:
        """Scores in (0, 1) that a gradient may reach; None where nothing learns from the mask."""
        return None

    def forward(self, x: Tensor) -> Routing:
        """Decide for inputs of shape [..., D]."""
        with uncast(x):
            scores = expert_scores(self.scores(x).float(), self.n_experts)
            banks = scores.detach().unflatten(-1, (-1, self.bank))
            mask = largest(banks, self.k).flatten(-2)
            gates = self.gates(scores)
        return Routing(mask.float() if gates is None else gates, mask)

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"n_experts={self.n_experts}, keeps {self.k} of {self.bank}"


class PredictorRouter(FixedShareRouter):
    """Scores by a predictor of its own, ``relu(x A) B + b``.

    Args:
        d_model: width D of the FFN's input.
        n_experts, sparsity, bank: as for :class:`FixedShareRouter`.
        rank: width of the layer between.
        learned: whether it is trained with the model, by a straight-through gradient.
        device: of the predictor.
    """

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        *,
        sparsity: float,
        rank: int,
        bank: int | None = None,
        learned: bool = False,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(n_experts, sparsity=sparsity, bank=bank)
        self.learned = learned
        self.reduce = nn.Parameter(torch.empty(rank, d_model, device=device, dtype=ROUTER_DTYPE), requires_grad=learned)
        self.weight = nn.Parameter(
            torch.empty(n_experts, rank, device=device, dtype=ROUTER_DTYPE), requires_grad=learned
        )
        self.bias = nn.Parameter(torch.empty(n_experts, device=device, dtype=ROUTER_DTYPE), requires_grad=learned)

    def freeze(self) -> None:
        """See :meth:`Router.freeze`."""
        self.requires_grad_(self.learned)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """Draw the weights on the CPU, so that logits have unit variance for inputs of unit variance."""
        rank, d_model = self.reduce.shape
        self.reduce.copy_(torch.randn(self.reduce.shape, generator=generator) * (2 / d_model) ** 0.5)
        self.weight.copy_(torch.randn(self.weight.shape, generator=generator) * (1 / rank) ** 0.5)
        self.bias.zero_()

    def scores(self, x: Tensor) -> Tensor:
        """The logits, [..., E]."""
        return F.linear(F.linear(x.float(), self.reduce).relu(), self.weight, self.bias)

    def gates(self, scores: Tensor) -> Tensor | None:
        """See :meth:`FixedShareRouter.gates`."""
        return torch.sigmoid(scores) if self.learned else None

    def cost(self) -> RouterCost:
        """See :meth:`Router.cost`."""
        return RouterCost.of_layers(self.parameters())


class TopKSoftmaxRouter(ThresholdRouter):
    """``softmax(x W_g + noise)``, the ``k`` largest run: the router of mixtures of experts (Shazeer et al., 2017).

    It is here to be compared with: scores that sum to 1 leave one expert near 1 and the others near 0, and every
    token gets the same number of experts. ``threshold`` has no meaning.

    Args:
        d_model, n_experts, bias, device: as for :class:`ThresholdRouter`.
        k: experts per token.
        noise: standard deviation of the Gaussian noise added to the logits in training.
    """

    uses_threshold = False

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        *,
        k: int,
        noise: float = 0.0,
        bias: bool = True,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(d_model, n_experts, bias=bias, device=device)
        self.k, self.noise = k, noise

    def forward(self, x: Tensor) -> Routing:
        """Route inputs of shape [..., D]."""
        with uncast(x):
            logits = self.logits(x)
            if self.training and self.noise:
                logits = logits + self.noise * torch.randn_like(logits)
            scores = logits.softmax(-1)
        return Routing(scores, largest(scores, self.k))


NOTHING = 1e-20
"""Smallest score: a ReLU leaves many at nothing, and they have no logarithm."""


class ScoreRouter(LookingRouter):
    """An expert runs where its score is large: a guess of the norm of its output, times how much the loss minds.

    The logit is the score's logarithm; of experts of several neurons that are guessed one by one, the score is the root
    of the sum of the squares. Sub-classes guess.

    Args:
        n_experts, threshold: as for :class:`Router`.
        device: of the sensitivities.
    """

    def __init__(self, n_experts: int, *, threshold: float = 0.5, device: torch.device | None = None) -> None:
        super().__init__(n_experts, threshold=threshold)
        ones = torch.ones(n_experts, device=device, dtype=ROUTER_DTYPE)
        self.sensitivity = nn.Parameter(ones, requires_grad=False)

    @torch.no_grad()
    def unit_scores(self) -> Tensor:
        """[F] float32, the score of a neuron whose activation is 1: the norm of its down row times the sensitivity."""
        return self.ffn.weights().down.float().norm(dim=1) * self.neuron_sensitivity()

    def neuron_sensitivity(self) -> Tensor:
        """[F], of each neuron that of its expert."""
        return self.sensitivity.repeat_interleave(self.ffn.weights().d_ff // self.n_experts)

    @abstractmethod
    def scores(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., E], or of every neuron, [..., F]."""

    def decide_by(self, scores: Tensor) -> Routing:
        """From scores in float32, [..., E]."""
        return self.decide(scores.clamp_min(NOTHING).log())

    def forward(self, x: Tensor) -> Routing:
        """Decide for inputs of shape [..., D]."""
        with uncast(x):
            scores = expert_scores(self.scores(x).float(), self.n_experts)
            return self.decide_by(scores)


class KeepLargestRouter(ScoreRouter):
    """An oracle: it computes every expert, and keeps those whose output is largest. It saves nothing.

    What a router could at best know without looking ahead; the dense model under it is the line that trained models
    are compared with.
    """

    def scores(self, x: Tensor) -> Tensor:
        """The norms themselves."""
        return self.ffn.output_norms(x) * self.sensitivity

    def cost(self) -> RouterCost:
        """Nothing: an oracle is not charged for what it looks at."""
        return RouterCost(0, 0, self.sensitivity.numel())
