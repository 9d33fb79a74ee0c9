"""A feed-forward network whose experts are switched per token, holding its weights under their stock names."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, nn

from lte.nn.gates import straight_through
from lte.nn.nested import NestedDown, NestedLinear
from lte.nn.projections import (
    DeferredLinear,
    has_hooks,
    is_packed,
    is_plain,
    keep_rows,
    kept,
    neuron_rows,
    pack_rows,
)
from lte.nn.quantized import QuantizedLinear
from lte.nn.router import Router
from lte.nn.routing import ConstantForm, CopyForm, HalfForm, LinearForm, NestedForm, Routing
from lte.ops import (
    SMALL_BATCH,
    FFNCopy,
    FFNWeights,
    NestedFFN,
    QuantizedFFN,
    copied_ffn,
    copies_run,
    nested_ffn,
    project_down,
    quantized_ffn,
    requested_backend,
    routed_ffn,
    scale_experts,
    sparse_ffn,
)

logger = logging.getLogger(__name__)

RoutingObserver = Callable[[int, Routing], None]
PathChooser = Callable[[int], tuple[str, float]]
"""Number of tokens -> the ``impl`` and ``max_density`` of :func:`lte.ops.sparse_ffn`."""


PROJECTIONS = ("gate", "up", "gate_up", "down")
"""The roles that hold weights."""


_said: set[str] = set()
_quiet: ContextVar[bool] = ContextVar("quiet", default=False)


@contextmanager
def unsaid() -> Iterator[None]:
    """Inside, nothing is said of FFNs that run masked and dense: it is this package that trains or watches them."""
    before = _quiet.set(True)
    try:
        yield
    finally:
        _quiet.reset(before)


TRAINED_HERE = "it was trained in this process; lte.prepare_for_inference(model) lays its weights out for the kernels"


class Mode(StrEnum):
    """How an FFN uses its router: not at all, as weights, as a mask (inference), or as a mask with a gradient."""

    DENSE = "dense"
    SOFT = "soft"
    HARD = "hard"
    STRAIGHT_THROUGH = "straight-through"


class SparseFFN(nn.Module):
    """An FFN with a router, in place of a family's own FFN module.

    The family's projections become children under the names they had, so that the state dict keeps the stock
    names, and they are called as modules, so that adapters and hooks put on them keep working.

    Args:
        parts: the family's own children, stock name -> module.
        roles: which part is what: ``up`` and ``down``, or ``gate``, ``up`` and ``down``, or ``gate_up`` and
            ``down``, and ``act``; optionally ``dropout``, applied to the output.
        activation: canonical name of the activation, see :class:`FFNWeights`.
        router: scores inputs of shape [..., D].
        layer_index: position among the model's FFNs, given to observers.
    """

    def __init__(
        self,
        parts: Mapping[str, nn.Module],
        roles: Mapping[str, str],
        *,
        activation: str,
        router: Router,
        layer_index: int,
    ) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self.roles = dict(roles)
        self.activation = activation
        self.router = router
        self.layer_index = layer_index
        self.removed = 0
        """Neurons that were taken out of the matrices, see :meth:`keep`."""
        self.mode = Mode.HARD
        self.hardness = 1.0
        """Of straight-through mode, see :func:`lte.nn.gates.straight_through`."""
        self.keep_layout = False
        """Whether an optimiser may hold state for the parameters: fused ones mistake it for another layout's."""
        self.observer: RoutingObserver | None = None
        self.choose_path: PathChooser = path_unmeasured
        self.masks_prompts = True
        """Whether neurons are left out of texts of more than ``SMALL_BATCH`` tokens too. If not, all run there, at
        inference and unless observed; an input of [tokens, D], which may be of many texts, counts as short."""
        self._packed: tuple[list[int], FFNWeights] | None = None
        router.attach(self)

    def __getstate__(self) -> dict[str, Any]:
        # What was looked up for these parameters does not belong to a copy.
        return {**self.__dict__, "_packed": None}

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D], in the current mode (LTE, sections 4.1 and 4.2).

        Hard mode at inference runs the sparse operator; everything else computes the masked dense form, which has
        gradients and lets adapters and hooks on the projections work.
        """
        few_bits = self.quantized()
        if self.is_nested:
            if self._runs_fast(x):
                return self._operate_on_planes(x)
        elif few_bits is not None:
            if x.numel() <= SMALL_BATCH * x.shape[-1] and self._runs_fast(x):
                return self._operate_on_codes(x, few_bits)
        elif self._runs_fast(x):
            if not self.masks_prompts and self.observer is None and x.ndim > 2 and x.shape[-2] > SMALL_BATCH:
                return self.project_down(self.hidden(x))
            impl, max_density = self.choose_path(x.numel() // x.shape[-1])
            if impl != "reference":
                if not self.keep_layout or is_packed(self.weights()):
                    return self._operate(x, impl, max_density)
                self._say_once(TRAINED_HERE)
        elif self.training and torch.is_grad_enabled():
            self.keep_layout = True
        hidden = self.hidden(x if self.mode == Mode.DENSE else self.router.inputs(x))
        if self.mode != Mode.DENSE:
            routing = self.router(x)
            if self.observer is not None:
                self.observer(self.layer_index, routing)
            hidden = self._switched(hidden, routing) if self.router.decides else hidden
        return self.project_down(hidden)

    def _switched(self, hidden: Tensor, routing: Routing) -> Tensor:
        if self.mode == Mode.STRAIGHT_THROUGH:
            return straight_through(hidden, routing, self.hardness)
        return scale_experts(hidden, routing.scores if self.mode == Mode.SOFT else routing.mask)

    def quantized(self) -> QuantizedFFN | None:
        """The weights of few bits, where the projections have such."""
        down = self._modules.get(self.roles.get("down", ""))
        if not isinstance(down, QuantizedLinear):
            return None
        gate = gate_bias = None
        if "gate_up" in self.roles:
            both = self._part("gate_up")
            assert isinstance(both, QuantizedLinear)
            gate, up = both.matrix.halves()
            gate_bias, up_bias = (None, None) if both.bias is None else both.bias.chunk(2)
        else:
            of_up = self._part("up")
            assert isinstance(of_up, QuantizedLinear)
            up, up_bias = of_up.matrix, of_up.bias
            if "gate" in self.roles:
                of_gate = self._part("gate")
                assert isinstance(of_gate, QuantizedLinear)
                gate, gate_bias = of_gate.matrix, of_gate.bias
        return QuantizedFFN(up, down.matrix, gate, up_bias, gate_bias, down.bias, self.activation)

    @property
    def is_nested(self) -> bool:
        """Whether the weights lie in two planes of bits, see :mod:`lte.ops.nested`."""
        return isinstance(self._modules.get(self.roles.get("down", "")), NestedDown)

    def nested(self, copy: FFNCopy) -> NestedFFN:
        """The weights in two planes, those of the copy among them."""
        up, down = self._part("up"), self._part("down")
        gate = self._part("gate") if "gate" in self.roles else None
        assert isinstance(up, NestedLinear)
        assert isinstance(down, NestedDown)
        assert gate is None or isinstance(gate, NestedLinear)
        return NestedFFN(
            copy=copy,
            down=down.planes,
            up_lower=up.planes.lower,
            gate_lower=None if gate is None else gate.planes.lower,
            up_bias=up.bias,
            gate_bias=None if gate is None else gate.bias,
            down_bias=down.bias,
            activation=self.activation,
        )

    def _runs_fast(self, x: Tensor) -> bool:
        """Whether an operator may stand for calls of the projections; why it may not is said once."""
        if self.mode != Mode.HARD or torch.is_grad_enabled() or self.training:
            return False
        reason = self.obstacle(x.device.type)
        if reason:
            self._say_once(reason)
        return not reason

    def _say_once(self, reason: str) -> None:
        if not torch.compiler.is_compiling() and reason not in _said and not _quiet.get():
            _said.add(reason)
            logger.warning(
                "the FFN of layer %d runs masked and dense, no faster than the dense model: %s",
                self.layer_index,
                reason,
            )

    def obstacle(self, device_type: str) -> str:
        """Why a forward at inference is the masked dense form, no faster than a dense one; empty where it is not."""
        if device_type != "meta" and torch.is_autocast_enabled(device_type):
            return "autocast is on; convert the model to the dtype instead"
        for role, name in self.roles.items():
            if role in PROJECTIONS and not is_plain(part := self._part(role)):
                if has_hooks(part):
                    return f"its {name} has hooks (accelerate puts them there under device_map, and tools that watch)"
                return f"its {name} is a {type(part).__name__} (an adapter? merge it into the model)"
        return ""

    def _operate_on_planes(self, x: Tensor) -> Tensor:
        if self.observer is not None:
            self.observer(self.layer_index, self.router(x))
        form = self.router.form()
        assert isinstance(form, NestedForm)
        return nested_ffn(x.reshape(-1, x.shape[-1]), form.weights, form.cut, form.fine_cut).view(x.shape)

    def _operate_on_codes(self, x: Tensor, weights: QuantizedFFN) -> Tensor:
        form, x_TD = self.router.form(), x.reshape(-1, x.shape[-1])
        unseen = self.observer is None and not has_hooks(self.router)
        if unseen and isinstance(form, LinearForm | ConstantForm):
            router = (form.weight, form.bias, form.threshold) if isinstance(form, LinearForm) else None
            return quantized_ffn(x_TD, weights, router=router).view(x.shape)
        routing = self.router(x)
        if self.observer is not None:
            self.observer(self.layer_index, routing)
        mask = routing.mask.flatten(0, -2) if self.router.decides else None
        return quantized_ffn(self.router.inputs(x_TD), weights, mask).view(x.shape)

    def _operate(self, x: Tensor, impl: str, max_density: float) -> Tensor:
        weights, form, x_TD = self.packed_weights(), self.router.form(), x.reshape(-1, x.shape[-1])
        unseen = self.observer is None and not has_hooks(self.router)
        if unseen and isinstance(form, LinearForm):
            out = routed_ffn(x_TD, form.weight, form.bias, form.threshold, weights, impl=impl, max_density=max_density)
        elif self.observer is None and isinstance(form, CopyForm) and copies_run(x_TD, weights, impl):
            of, experts = (form.copy, form.cut), self.router.n_experts
            out = copied_ffn(x_TD, *of, experts, weights, impl=impl, max_density=max_density)
        elif self.observer is None and isinstance(form, HalfForm):
            left = weights.without(form.known)
            out = sparse_ffn(x_TD, left, form.decide(x_TD), impl=impl, max_density=max_density)
        elif unseen and isinstance(form, ConstantForm):
            out = self._run_all(x_TD, weights, impl, max_density)
        else:
            routing = self.router(x)
            if self.observer is not None:
                self.observer(self.layer_index, routing)
            if not self.router.decides:
                return self._run_all(x_TD, weights, impl, max_density).view(x.shape)
            x_TD = self.router.inputs(x_TD)
            out = sparse_ffn(x_TD, weights, routing.mask.flatten(0, -2), impl=impl, max_density=max_density)
        return out.view(x.shape)

    @staticmethod
    def _run_all(x_TD: Tensor, weights: FFNWeights, impl: str, max_density: float) -> Tensor:
        every = x_TD.new_ones(len(x_TD), 1, dtype=torch.bool)
        return sparse_ffn(x_TD, weights, every, impl=impl, max_density=max_density)

    @property
    def removed_weights(self) -> int:
        """Of the neurons that were taken out."""
        if not self.removed:
            return 0
        weights = self.quantized() or self.weights()
        return self.removed * weights.d_model * (2 if weights.gate is None else 3)

    @property
    def n_experts(self) -> int:
        """Number of experts that kernels tell apart: those of the router; one where all neurons left always run."""
        return self.router.n_experts if self.router.decides else 1

    @torch.no_grad()
    def keep(self, neurons: Tensor) -> None:
        """Take all other neurons out of the matrices, for good.

        Args:
            neurons: [k] long, positions, of those that stay.
        """
        every = self.weights().d_ff
        for role in self.roles:
            if role in PROJECTIONS:
                rows = torch.cat([neurons, neurons + every]) if role == "gate_up" else neurons
                keep_rows(self._part(role), rows, of_inputs=role == "down")
        self._keep_more(neurons)
        self.removed += every - len(neurons)
        self._packed = None

    def _keep_more(self, neurons: Tensor) -> None:
        """Of matrices that are in no part."""

    @torch.no_grad()
    def down_bias(self) -> nn.Parameter:
        """The bias of the down projection, [D], made of zeros where there is none."""
        module = self._part("down") if "down" in self.roles else self
        if module._parameters.get("bias") is None:
            module.bias = nn.Parameter(self.weights().down.new_zeros(self.weights().d_model))
        self._packed = None
        bias = module.bias
        assert isinstance(bias, nn.Parameter)
        return bias

    def projections(self) -> list[nn.Module]:
        """The modules that hold the matrices."""
        return [self._part(role) for role in self.roles if role in PROJECTIONS]

    def packed_weights(self) -> FFNWeights:
        """The weights, every neuron's row contiguous; laid out so on first use, in place, no value changed.

        A model that is being trained is not laid out anew by running it (``keep_layout``), only by
        :func:`lte.prepare_for_inference`.
        """
        if torch.compiler.is_compiling():  # a graph has no pointers; it is made of a model that is packed
            return self.weights()
        pointers = [p.data_ptr() for p in self._ffn_parameters()]
        if self._packed is None or self._packed[0] != pointers:
            weights = self.weights()
            if not is_packed(weights):
                self.pack()
                weights = self.weights()
                pointers = [p.data_ptr() for p in self._ffn_parameters()]
            self._packed = pointers, weights
        return self._packed[1]

    def _ffn_parameters(self) -> list[nn.Parameter]:
        return [p for module in self.projections() for p in module._parameters.values() if p is not None]

    @torch.no_grad()
    def pack(self, copy: Callable[[Tensor], Tensor] = torch.Tensor.contiguous) -> None:
        """Lay every projection out with one contiguous row per neuron; shapes and values stay as they are.

        Args:
            copy: makes the contiguous copy of a [rows, columns] view.
        """
        for role in self.roles:
            if role in PROJECTIONS:
                module = self._part(role)
                pack_rows(module, copy, transpose=(role == "down") != hasattr(module, "nf"))

    def hidden(self, x: Tensor) -> Tensor:
        """What enters the down projection: [..., D] -> [..., F]."""
        act = self._part("act")
        if "gate_up" in self.roles:
            gate, up = self._part("gate_up")(x).chunk(2, dim=-1)
            return act(gate) * up
        if "gate" in self.roles:
            return act(self._part("gate")(x)) * self._part("up")(x)
        return act(self._part("up")(x))

    def output_norms(self, x: Tensor) -> Tensor:
        """Norm of what each expert would add to the output for an input: [..., D] -> [..., E]."""
        return self.expert_norms(self.hidden(x))

    def expert_norms(self, hidden: Tensor) -> Tensor:
        """Norm of what each expert adds to the output, from what enters the down projection: [..., F] -> [..., E]."""
        down_EKD = self.weights().down.detach().float().unflatten(0, (self.router.n_experts, -1))
        hidden_ETK = hidden.float().flatten(0, -2).unflatten(-1, down_EKD.shape[:2]).transpose(0, 1)
        # Of rows that are longer than an expert has neurons, inner products are all that is needed.
        squares_ET = ((hidden_ETK @ (down_EKD @ down_EKD.mT)) * hidden_ETK).sum(-1)
        return squares_ET.clamp_min(0).sqrt().T.unflatten(0, hidden.shape[:-1])

    def project_down(self, hidden: Tensor) -> Tensor:
        """[..., F] -> [..., D], with the family's output dropout where it has one."""
        down = self._part("down")
        if type(down) is nn.Linear and not down.weight.is_contiguous() and not has_hooks(down):
            out = project_down(hidden, down.weight, down.bias)
        else:
            out = down(hidden)
        return self._part("dropout")(out) if "dropout" in self.roles else out

    def weights(self) -> FFNWeights:
        """The parameters as views in one layout; writing to them writes to the model."""
        gate = gate_bias = None
        if "gate_up" in self.roles:
            weight, bias = neuron_rows(self._part("gate_up"))
            gate, up = weight.chunk(2)
            gate_bias, up_bias = (None, None) if bias is None else bias.chunk(2)
        else:
            up, up_bias = neuron_rows(self._part("up"))
            if "gate" in self.roles:
                gate, gate_bias = neuron_rows(self._part("gate"))
        down, down_bias = self._down_parameters()
        return FFNWeights(
            up=up,
            down=down,
            gate=gate,
            up_bias=up_bias,
            gate_bias=gate_bias,
            down_bias=down_bias,
            activation=self.activation,
        )

    def _down_parameters(self) -> tuple[Tensor, Tensor | None]:
        weight, bias = neuron_rows(self._part("down"))
        return weight.T, bias

    def _part(self, role: str) -> nn.Module:
        part = getattr(self, self.roles[role])
        assert isinstance(part, nn.Module)
        return part


def path_unmeasured(tokens: int) -> tuple[str, float]:
    """Before anything is measured: the kernels for few tokens, dense matrix products for many."""
    if tokens <= SMALL_BATCH:
        return "auto", 1.0
    forced = None if torch.compiler.is_compiling() else requested_backend("auto")
    return ("reference", 1.0) if forced in (None, "auto") else ("auto", 1.0)


class SplitSparseFFN(SparseFFN):
    """A sparse FFN for families that keep the two projections apart (OPT in the block, BERT in two modules).

    It takes the place of the *down* projection and owns its parameters. The block still calls the up projection
    and the activation first; both pass their input through (:class:`DeferredLinear`, ``nn.Identity``), so the
    FFN's input arrives here, where the whole FFN is computed.

    Args:
        up: the up projection, which stays registered where the family has it.
        down: the down projection being replaced.
        act: the activation.
    """

    def __init__(
        self,
        up: DeferredLinear,
        down: nn.Linear,
        act: nn.Module,
        *,
        activation: str,
        router: Router,
        layer_index: int,
    ) -> None:
        super().__init__({"act": act}, {"act": "act"}, activation=activation, router=router, layer_index=layer_index)
        self.weight = down.weight
        self.bias = down.bias
        # Inside a list the module is reached without being registered here a second time.
        self._up = [up]

    def hidden(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., F]."""
        return self._part("act")(self._up[0].project(x))

    def projections(self) -> list[nn.Module]:
        """The up projection; the down projection is this module itself."""
        return [self._up[0]]

    def _ffn_parameters(self) -> list[nn.Parameter]:
        return super()._ffn_parameters() + [p for p in self._parameters.values() if p is not None]

    @torch.no_grad()
    def pack(self, copy: Callable[[Tensor], Tensor] = torch.Tensor.contiguous) -> None:
        """See :meth:`SparseFFN.pack`."""
        pack_rows(self._up[0], copy, transpose=False)
        pack_rows(self, copy, transpose=True)

    def _keep_more(self, neurons: Tensor) -> None:
        keep_rows(self._up[0], neurons, of_inputs=False)
        self.weight = kept(self.weight, neurons, 1)

    def project_down(self, hidden: Tensor) -> Tensor:
        """[..., F] -> [..., D]."""
        return project_down(hidden, self.weight, self.bias)

    def weights(self) -> FFNWeights:
        """The parameters as views in one layout; writing to them writes to the model."""
        up = self._up[0]
        return FFNWeights(
            up=up.weight, down=self.weight.T, up_bias=up.bias, down_bias=self.bias, activation=self.activation
        )
