"""One decode step of a whole model as one call into the CPU kernels, in place of the model's ``forward``.

A step of the stock modules costs some 20 Python-level operations per layer, and a matrix-vector product of torch
reads memory at a fraction of its speed. Here a step is one embedding lookup in Python and one call, which computes in
float32 between the weights; or a call per layer, where PyTorch has to decide which neurons run. Whatever is not an
ordinary step (prefill, gradients, hooks, observers, an unusual cache, ...) goes to the stock forward.
"""

from __future__ import annotations

import ctypes
import inspect
import operator
import weakref
from collections.abc import Iterator
from ctypes import POINTER, cast, pointer
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from lte.families import DECODERS, blocks_of
from lte.inference.cache import LastCache, room
from lte.nn import (
    ROUTER_DTYPE,
    ConstantForm,
    CopyForm,
    CopyRouter,
    FastLinear,
    Form,
    HalfForm,
    LinearForm,
    Mode,
    NestedDown,
    NestedForm,
    NestedLinear,
    QuantizedLinear,
    QuantizedWeight,
    SparseFFN,
    TiedHead,
    sparse_ffns,
)
from lte.ops import FFNCopy
from lte.ops.cpu import DTYPES, kernels
from lte.ops.cpu.calls import (
    describe_copied_ffn,
    describe_ffn,
    describe_nested_ffn,
    describe_quantized_ffn,
    lowbit_matrix,
)
from lte.ops.cpu.library import FFN, Cache, Decoder, Layer, Matrix, Step, matrix

MAX_BATCH = 64
MAX_POSITION = 1 << 20
STATIC_ROPE = ("default", "linear", "llama3", "yarn", "proportional")
"""Rotary embeddings whose frequencies do not change with the length; those of others are asked for at every step."""


class DecodeStep:
    """Takes the place of ``model.forward``; put there by :func:`lte.prepare_for_inference`.

    Args:
        model: a causal language model of a family in :data:`lte.families.DECODERS`.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.stock = model.forward
        self.__signature__ = inspect.signature(model.forward)
        self.__doc__ = model.forward.__doc__
        self._built: _Built | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Pointers belong to one model in one process; a copy builds its own.
        return {**self.__dict__, "_built": None}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward."""
        if len(args) == 1 and "input_ids" not in kwargs:
            kwargs["input_ids"], args = args[0], ()
        if not args and self._is_plain_inference():
            logits = self._step(**kwargs)
            if logits is not None:
                return CausalLMOutputWithPast(logits=logits, past_key_values=kwargs["past_key_values"])
        return self.stock(*args, **kwargs)

    def _is_plain_inference(self) -> bool:
        if torch.is_grad_enabled() or self.model.training or torch.compiler.is_compiling():
            return False
        config = self.model.config
        wants_more = config.output_hidden_states or config.output_attentions or not config.return_dict
        return not wants_more and not torch.is_autocast_enabled("cpu")

    def obstacle(self) -> str:
        """Why this model's step cannot be fused; empty where it can."""
        model = self.model
        if getattr(model.config, "model_type", "") not in DECODERS:
            return f"no fused step for the family {getattr(model.config, 'model_type', '?')!r}"
        if type(getattr(model, "lm_head", None)) not in (nn.Linear, FastLinear, QuantizedLinear, TiedHead):
            return f"{type(model).__name__} has no plain LM head"
        if len(sparse_ffns(model)) != len(blocks_of(model)):
            return "not every FFN is sparse"
        parameters = list(model.parameters())
        routers = {id(p) for ffn in sparse_ffns(model) for p in ffn.router.parameters()}
        if {p.dtype for p in parameters if id(p) not in routers} not in ({torch.float32}, {torch.bfloat16}):
            return "the parameters are not all float32 or all bfloat16"
        if any(p.dtype != ROUTER_DTYPE or not p.is_contiguous() for p in parameters if id(p) in routers):
            return "a router is not in float32, its rows side by side"
        if {p.device.type for p in parameters} != {"cpu"}:
            return "the parameters are not all on the CPU"
        for name, module in _decoder_linears(model):
            if type(module) in (QuantizedLinear, NestedLinear, NestedDown):
                continue
            if type(module) not in (nn.Linear, FastLinear) or type(module.weight) is not nn.Parameter:
                return f"{name} is a {type(module).__name__}, not a plain linear layer"
        return ""

    def stops(self) -> bool:
        """Whether the step stops at FFNs because PyTorch decides which of their neurons run."""
        return any(_is_asked(ffn.router.form()) for ffn in sparse_ffns(self.model))

    def _step(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        cache_position: Tensor | None = None,
        **others: Any,
    ) -> Tensor | None:
        """Logits [B, 1, V], or None where this is no step for the kernels."""
        if input_ids is None or input_ids.dim() != 2 or input_ids.shape[1] != 1 or len(input_ids) > MAX_BATCH:
            return None
        if use_cache is False or return_dict is False or isinstance(logits_to_keep, Tensor):
            return None
        if any(value is not None and value is not False for value in others.values()):
            return None
        if type(past_key_values) is not DynamicCache or not past_key_values.layers:
            return None
        built = self._current()
        if built is None:
            return None
        batch, position = len(input_ids), past_key_values.get_seq_length()
        if attention_mask is not None and (
            attention_mask.dim() != 2
            or attention_mask.shape != (batch, position + 1)
            or attention_mask.dtype != torch.int64
        ):
            return None
        if position_ids is None:
            position_ids = input_ids.new_full((batch, 1), position)
        elif position_ids.shape != (batch, 1):
            if position_ids.numel() != 1:
                return None
            position_ids = position_ids.expand(batch, 1)
        hidden = built.embedding(input_ids).contiguous()
        rotations = built.rotate(position_ids)
        # Last, because it makes room in the cache: what cannot go on must leave the cache as it was.
        caches = None if rotations is None else built.caches(past_key_values, batch, position)
        if rotations is None or caches is None:
            return None
        return built.run(hidden, position, rotations, attention_mask, caches)

    def _current(self) -> _Built | None:
        """What the kernels read of the model, built again where a parameter has moved; None where hooks watch."""
        if self._built is None or not self._built.holds():
            self._built = None if self.obstacle() else _Built(self.model)
        return None if self._built is None or self._built.is_watched() else self._built


class _Built:
    """The C structs of one model, with the tensors they point to."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.modules = [module for module in model.modules() if module is not model]
        config, spec = model.config, DECODERS[model.config.model_type]
        # Where parameters are looked up, not the parameters: one that was replaced has to be noticed too.
        slots = [(m._parameters, name) for m in self.modules for name, p in m._parameters.items() if p is not None]
        rounded = [module for module in self.modules if isinstance(module, QuantizedWeight)]
        slots += [(module._buffers, name) for module in rounded for name in module._buffers]
        self.slots = tuple(zip(*slots, strict=True))
        self.ffns = sparse_ffns(model)
        self.modes = [ffn.mode for ffn in self.ffns]
        self.routers = [ffn.router for ffn in self.ffns]
        self.thresholds = [(router.threshold, router.fine) for router in self.routers]
        forms = [router.form() for router in self.routers]
        # Copies are of the weights as they are now, and the structs point into them.
        self.copies = [copy for form in forms if (copy := _copy_of(form)) is not None]
        self.copying = [
            (router, copy)
            for router, form in zip(self.routers, forms, strict=True)
            if isinstance(router, CopyRouter) and (copy := _copy_of(form)) is not None
        ]
        self.copied = [p for ffn in self.ffns for p in ffn.parameters()] if self.copies else []
        self.versions = [p._version for p in self.copied]
        self.registers = [m._modules for m in (model, *self.modules) if m._modules]
        self.children = [list(register.values()) for register in self.registers]
        # The dictionaries themselves: looking at them is all that a step can afford.
        self.hooks = [h for m in self.modules for h in (m._forward_hooks, m._forward_pre_hooks)]
        self.hooks += [torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks]
        self.attributes = [m.__dict__ for m in self.modules]
        self.asked = {
            index: form
            for index, (ffn, form) in enumerate(zip(self.ffns, forms, strict=True))
            if _is_asked(form) and ffn.mode != Mode.DENSE
        }
        """Layers where the step stops for PyTorch to decide."""
        base, blocks = model.base_model, blocks_of(model)
        norm = base.get_submodule(spec.final_norm)
        self.dtype = norm.weight.dtype
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.n_kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        self.layers = (Layer * len(blocks))(
            *(self._layer(block, ffn, form, spec) for block, ffn, form in zip(blocks, self.ffns, forms, strict=True))
        )
        self.rotary = base.get_submodule(spec.rotary)
        self.static_rope = getattr(self.rotary, "rope_type", "") in STATIC_ROPE
        self.embedding = model.get_input_embeddings()
        self.head = model.lm_head
        # A dynamic embedding changes with every length it is asked for: it is not asked before it has to be.
        self.cos_sin = (torch.empty(0), torch.empty(0))
        self.window = getattr(config, "sliding_window", None)
        self.decoder = Decoder(
            layers=cast(self.layers, POINTER(Layer)),
            final_norm=norm.weight.data_ptr(),
            head=_matrix(self.head),
            n_layers=len(blocks),
            d_model=config.hidden_size,
            n_heads=config.num_attention_heads,
            n_kv_heads=self.n_kv_heads,
            head_dim=self.head_dim,
            rotary_dim=2 * self.rotary.inv_freq.shape[-1],
            norm_eps=getattr(norm, "variance_epsilon", None) or norm.eps,
            norm_offset=spec.norm_offset,
            scaling=blocks[0].get_submodule(spec.output.rpartition(".")[0]).scaling,
            dtype=DTYPES[self.dtype],
        )
        self.pointers = self._current_pointers()
        self.last: LastCache | None = None

    def holds(self) -> bool:
        """Whether the structs still describe the model."""
        if [ffn.mode for ffn in self.ffns] != self.modes:
            return False
        if [(router.threshold, router.fine) for router in self.routers] != self.thresholds:
            return False
        if list(map(list, map(dict.values, self.registers))) != self.children:
            return False
        if [p._version for p in self.copied] != self.versions:
            return False
        if any(router.held is not copy for router, copy in self.copying):
            return False
        return self._current_pointers() == self.pointers

    def _current_pointers(self) -> list[int]:
        held: Iterator[Tensor] = map(operator.getitem, *self.slots)
        return list(map(Tensor.data_ptr, held))

    def is_watched(self) -> bool:
        """Whether hooks or observers want to see the modules run, or soft mode is on: the stock forward then does."""
        if any(self.hooks) or any(map(operator.contains, self.attributes, repeat("forward"))):
            return True
        return any(ffn.observer is not None or ffn.mode == Mode.SOFT for ffn in self.ffns)

    def _layer(self, block: nn.Module, ffn: SparseFFN, form: Form | None, spec: Any) -> Layer:
        def weight(path: str) -> int:
            return block.get_submodule(path).get_parameter("weight").data_ptr()

        qkv = [_matrix(block.get_submodule(path)) for path in spec.qkv]
        return Layer(
            attention_norm=weight(spec.attention_norm),
            ffn_norm=weight(spec.ffn_norm),
            q_norm=weight(spec.head_norms[0]) if spec.head_norms else None,
            k_norm=weight(spec.head_norms[1]) if spec.head_norms else None,
            qkv=(Matrix * 3)(*qkv, *(Matrix() for _ in range(3 - len(qkv)))),
            output=_matrix(block.get_submodule(spec.output)),
            ffn=self._ffn(ffn, form),
            all_experts=int(ffn.mode == Mode.DENSE or isinstance(form, ConstantForm)),
        )

    def _ffn(self, ffn: SparseFFN, form: Form | None) -> FFN:
        experts, few_bits = ffn.n_experts, ffn.quantized()
        if few_bits is not None:
            router = (form.weight, form.bias, form.threshold) if isinstance(form, LinearForm) else None
            return describe_quantized_ffn(few_bits, experts, self.dtype, router)
        if isinstance(form, NestedForm):
            cuts = (-1.0, -1.0) if ffn.mode == Mode.DENSE else (form.cut, form.fine_cut)
            return describe_nested_ffn(form.weights, *cuts, self.dtype)
        weights = ffn.packed_weights()
        if isinstance(form, CopyForm):
            return describe_copied_ffn(weights, experts, form.copy, form.cut)
        if isinstance(form, LinearForm):
            return describe_ffn(weights, experts, form.weight, form.bias, form.threshold)
        if isinstance(form, HalfForm) and ffn.mode != Mode.DENSE:
            return describe_ffn(weights.without(form.known), weights.d_ff)
        return describe_ffn(weights, experts)

    def caches(self, cache: DynamicCache, batch: int, position: int) -> Any:
        """Room for one more token in every layer's cache, as C structs; None where the cache is of another kind."""
        if self.last is not None and self.last.goes_on(cache, batch, position):
            return self.last.grow()
        if position == 0 or len(cache.layers) != len(self.layers):
            return None
        if self.window is not None and position + 1 >= self.window:
            return None
        for layer in cache.layers:
            sliding = type(layer) is DynamicSlidingWindowLayer
            if not (type(layer) is DynamicLayer or sliding) or not layer.is_initialized:
                return None
            if sliding and (layer.record_past or layer.cumulative_length != position):
                return None
            if layer.keys.dtype != self.dtype or layer.keys.shape != (batch, self.n_kv_heads, position, self.head_dim):
                return None
            if layer.values.shape != layer.keys.shape:
                return None
        structs = (Cache * len(cache.layers))()
        for struct, layer in zip(structs, cache.layers, strict=True):
            keys, values = room(layer, position)
            layer._lte_buffers.grow(layer)
            if type(layer) is DynamicSlidingWindowLayer:
                layer.cumulative_length += 1
            struct.keys, struct.values = keys.data_ptr(), values.data_ptr()
            struct.batch_stride, struct.head_stride, struct.token_stride = keys.stride()[:3]
        plain = self.window is None and all(type(layer) is DynamicLayer for layer in cache.layers)
        self.last = LastCache(weakref.ref(cache), batch, structs) if plain else None
        return structs

    def run(
        self,
        hidden: Tensor,
        position: int,
        rotations: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        caches: Any,
    ) -> Tensor:
        """Logits [B, 1, V] in the dtype of the model."""
        batch = len(hidden)
        cos, sin = rotations
        mask = None if attention_mask is None else attention_mask.contiguous()
        logits = torch.empty(batch, 1, self.decoder.head.rows, dtype=self.dtype)
        step = Step(
            batch=batch,
            position=position,
            hidden=hidden.data_ptr(),
            cos=cos.data_ptr(),
            sin=sin.data_ptr(),
            mask=None if mask is None else mask.data_ptr(),
            mask_stride=position + 1,
            caches=cast(caches, POINTER(Cache)),
            logits=logits.data_ptr(),
        )
        inputs_BD = torch.empty(batch, hidden.shape[-1]) if self.asked else None
        step.inputs = None if inputs_BD is None else inputs_BD.data_ptr()
        for layer, form in self.asked.items():
            assert inputs_BD is not None
            self._run_to(step, layer + 1)
            scale_BE = self._decide(self.ffns[layer], form, inputs_BD)
            step.scale = scale_BE.data_ptr()
        self._run_to(step, len(self.layers) + 1)
        return logits

    def _run_to(self, step: Step, part: int) -> None:
        step.to_part = part
        kernels().lte_decode(ctypes.byref(self.decoder), pointer(step), torch.get_num_threads())
        step.from_part = part

    def _decide(self, ffn: SparseFFN, form: Form | None, inputs_BD: Tensor) -> Tensor:
        """The weights of experts or neurons that a router of Python code gives, which may change the inputs too."""
        x_BD = inputs_BD.to(self.dtype)
        if isinstance(form, HalfForm):
            return form.decide(x_BD).float().contiguous()
        scale_BE = ffn.router(x_BD).mask.float().contiguous()
        inputs_BD.copy_(ffn.router.inputs(x_BD))
        return scale_BE

    def rotate(self, position_ids: Tensor) -> tuple[Tensor, Tensor] | None:
        """Rotations [B, rotary_dim] in float32; None for positions no sequence has."""
        positions = position_ids[:, 0].tolist()
        if not 0 <= min(positions) <= max(positions) < MAX_POSITION:
            return None
        if not self.static_rope:
            cos, sin = self._rotations(position_ids)
            return cos.flatten(0, 1), sin.flatten(0, 1)
        largest = max(positions)
        if largest >= len(self.cos_sin[0]):
            cos, sin = self._rotations(torch.arange(2 * largest + 256)[None])
            self.cos_sin = cos[0], sin[0]
        rows = position_ids[:, 0]
        return self.cos_sin[0][rows], self.cos_sin[1][rows]

    @torch.no_grad()
    def _rotations(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self.rotary(torch.zeros(1, dtype=torch.float32), position_ids)
        return cos.contiguous(), sin.contiguous()


def _matrix(layer: Any) -> Matrix:
    if isinstance(layer, QuantizedLinear | TiedHead):
        return lowbit_matrix(layer.matrix, layer.bias)
    return matrix(layer.weight, layer.bias)


def _copy_of(form: Form | None) -> FFNCopy | None:
    if isinstance(form, NestedForm):
        return form.weights.copy
    return form.copy if isinstance(form, CopyForm) else None


def _is_asked(form: Form | None) -> bool:
    return form is None or isinstance(form, HalfForm)


def _decoder_linears(model: Any) -> list[tuple[str, nn.Module]]:
    spec = DECODERS[model.config.model_type]
    found = []
    for index, (block, ffn) in enumerate(zip(blocks_of(model), sparse_ffns(model), strict=True)):
        found += [(f"layer {index}: {path}", block.get_submodule(path)) for path in (*spec.qkv, spec.output)]
        found += [(f"layer {index}: FFN", module) for module in ffn.projections()]
    return found
