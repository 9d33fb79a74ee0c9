"""What a sparse model's ``config.json`` says, and what it makes of it: a method's settings, and its behaviour."""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Generic, Literal, TypeVar, get_args

import pydantic
import torch
from torch import Tensor, nn
from transformers.utils.quantization_config import QuantizationConfigMixin

from lte.errors import CheckpointError, ConfigError
from lte.grouping import Activations, NeuronGradients, needs_activations
from lte.nn import Router, SparseFFN

ModelT = TypeVar("ModelT", bound=pydantic.BaseModel)
MethodT = TypeVar("MethodT", bound="Method[Any]")

QUANT_METHOD = "lte"
"""Name under which this package registers itself with transformers."""

FORMAT_VERSION = 2
"""Version of the saved format; a checkpoint of another one is refused."""


class Settings(pydantic.BaseModel):
    """Values of their own types: to pydantic, true is a 1."""

    @pydantic.field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: pydantic.ValidationInfo) -> Any:
        kind = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and bool not in (kind, *get_args(kind)):
            raise ValueError("is neither true nor false")
        return value


class MethodConfig(Settings):
    """Settings that all methods have: what is switched, and where. A method's own are those of its subclass.

    Attributes:
        expert_size: neurons per expert; must divide d_ff.
        grouping: name of the grouping, see :data:`lte.grouping.GROUPINGS`.
        layers: indices of the blocks whose FFN is made sparse; None for all.
        activation: ``relu`` puts a ReLU in the place of every FFN's activation, in ``config.json`` too; the model has
            to be trained to it. None leaves it as it is.
        seed: of the grouping and of the routers' initial weights.
    """

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)
    method: ClassVar[str]
    sparsity_is: ClassVar[str] = "threshold"
    """What gives a sparsity: a ``threshold`` that is moved, a ``fixed share`` that is set, the model: ``its own``."""

    expert_size: Annotated[int, pydantic.Field(ge=1)] = 32
    grouping: str = "predicted"
    layers: Annotated[tuple[Annotated[int, pydantic.Field(ge=0)], ...] | None, pydantic.Field(min_length=1)] = None
    activation: Literal["relu"] | None = None
    seed: int = 0

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except pydantic.ValidationError as error:
            raise explain(error, type(self), type(self).__name__) from None


class FixedShareConfig(MethodConfig):
    """Settings of methods under which every token gets the same share of a layer's experts.

    Attributes:
        sparsity: share of the experts that do not run; ``--target-sparsity`` sets it.
    """

    sparsity_is: ClassVar[str] = "fixed share"

    sparsity: Annotated[float, pydantic.Field(gt=0, lt=1)] = 0.5


class LayerwiseConfig(MethodConfig):
    """Settings of methods whose papers take thresholds layer by layer.

    Attributes:
        per_layer: calibration brings every layer to the sparsity, by a threshold of its own, as published, instead of
            all of them together by one threshold. A training with a target moves one threshold for all in any case.
    """

    per_layer: bool = True


ConfigT = TypeVar("ConfigT", bound=MethodConfig)


class Method(ABC, Generic[ConfigT]):
    """What a method does with its settings: the routers its FFNs get, and the values they start from.

    A method is one file with one subclass of this and one of :class:`MethodConfig`, and :func:`register_method`.

    Args:
        config: the settings.
    """

    decides: ClassVar[str] = ""
    """What says which experts run, in a few words."""

    trains: ClassVar[bool] = True
    """Whether the model is trained under it as published; if not, it is applied to a trained dense model."""

    preset: ClassVar[str] = "single-stage"
    """How a model is trained under it unless a recipe says otherwise, of :data:`lte.recipe.PRESETS`."""

    fitted: ClassVar[bool] = False
    """Whether what decides is fitted to calibration data."""

    families: ClassVar[str] = "all"
    """Which FFNs it is for, in words."""

    kernels: ClassVar[str] = "run its mask"
    """What kernels of ours do with it, in words."""

    looks_at_loss: ClassVar[bool] = True
    """Whether calibration runs the loss too, forward and backward, where there are labels: sensitivities come of it."""

    calibration_tokens: ClassVar[int] = 8192
    """Tokens that grouping and initialisation should see."""

    dial_tokens: ClassVar[int] = 16384
    """Tokens on which thresholds are found where nothing is trained."""

    trainable: ClassVar[bool] = True
    """Whether a model can be trained under it."""

    in_sequence: ClassVar[bool] = False
    """Whether an FFN's calibration is of the model as it is when asked for, those before it changed already."""

    def __init__(self, config: ConfigT) -> None:
        self.config = config

    @property
    def learns(self) -> bool:
        """Whether losses on the scores change any weight."""
        return True

    @property
    def neuron_gradients(self) -> NeuronGradients | None:
        """What is measured of the loss's gradients for every neuron, see :attr:`Activations.neuron_gradients_F`."""
        return None

    @property
    def needs_calibration(self) -> str | None:
        """The setting that asks for calibration data, for the routers or for the grouping; None where none does."""
        if self.fitted:
            return f"method={self.config.method!r}"
        return f"grouping={self.config.grouping!r}" if needs_activations(self.config.grouping) else None

    @abstractmethod
    def make_router(self, d_model: int, n_experts: int, like: nn.Parameter) -> Router:
        """A router whose parameters hold no values yet, in float32, on the device of ``like``."""

    @abstractmethod
    def init_routers(
        self, ffns: Sequence[SparseFFN], activations: Iterator[Activations] | None, generator: torch.Generator
    ) -> None:
        """Give the new routers their initial weights.

        Args:
            ffns: all of the model's, their neurons already grouped.
            activations: of every FFN in turn, its neurons in the new order, computed as they are asked for; None
                where there is no calibration data.
            generator: on the CPU, for what is drawn.
        """

    def install(self, model: nn.Module) -> None:
        """Change what a model's weights are loaded into, after its FFNs came: their shapes, or other parts of it."""

    def fit_blocks(self, model: nn.Module, batches: Sequence[Mapping[str, Tensor]]) -> None:
        """Find what whole blocks decide, once the routers are filled.

        Args:
            model: with all its FFNs.
            batches: of model inputs, without labels where the method does not look at the loss.
        """

    def settled(self, ffns: Sequence[SparseFFN]) -> ConfigT:
        """The settings to be saved, once routers are filled."""
        return self.config


METHODS: dict[str, tuple[type[MethodConfig], type[Method[Any]]]] = {}
"""Method name -> its settings, and what it does with them."""


def register_method(settings: type[MethodConfig]) -> Callable[[type[MethodT]], type[MethodT]]:
    """Class decorator: make a method known under the name of its settings."""

    def register(method: type[MethodT]) -> type[MethodT]:
        METHODS[settings.method] = settings, method
        return method

    return register


def method_config(name: str, values: dict[str, Any]) -> MethodConfig:
    """The settings of the method called ``name``; ConfigError for an unknown method or key."""
    return settings_of(name)(**values)


def sparsity_is(name: str) -> str:
    """What gives a sparsity under a method, see :class:`MethodConfig`; ConfigError for an unknown one."""
    return settings_of(name).sparsity_is


def settings_of(name: str) -> type[MethodConfig]:
    """The class of a method's settings; ConfigError lists the known ones."""
    if not isinstance(name, str) or name not in METHODS:
        raise ConfigError(f"unknown method {name!r}; known methods: {', '.join(sorted(METHODS))}")
    return METHODS[name][0]


def method_of(config: MethodConfig) -> Method[Any]:
    """What does as some settings say."""
    return METHODS[config.method][1](config)


class OperatingPoint(pydantic.BaseModel):
    """Thresholds that were found to give a sparsity.

    Attributes:
        sparsity: share of FFN neurons not used, as measured on the calibration text.
        thresholds: one per FFN, each in (0, 1).
        sparsity_per_layer: of every FFN.
        per_layer: whether every layer was brought to the sparsity, with a threshold of its own.
    """

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    sparsity: Annotated[float, pydantic.Field(ge=0, le=1)]
    thresholds: tuple[Annotated[float, pydantic.Field(gt=0, lt=1)], ...] = pydantic.Field(min_length=1)
    sparsity_per_layer: tuple[float, ...]
    per_layer: bool = False


class WeightsConfig(Settings):
    """How weights of few bits are stored; ConfigError for anything else.

    Attributes:
        bits: of a weight.
        group: weights that share a scale.
        head_bits: of the weights of head and embeddings; None for as many.
        tied: whether the head multiplies with the embeddings' weights.
        coarse: of the bits, those of FFNs of single neurons that are read of all of them and say which are needed; None
            where no FFN is in two planes.
        exact: neurons of an FFN in two planes whose rows of the down projection are not rounded, in bfloat16.
    """

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    bits: Annotated[int, pydantic.Field(ge=1, le=8)]
    group: Annotated[int, pydantic.Field(ge=32, multiple_of=32)] = 32
    head_bits: Annotated[int, pydantic.Field(ge=1, le=8)] | None = None
    tied: bool = False
    coarse: Annotated[int, pydantic.Field(ge=1, le=4)] | None = None
    exact: Annotated[int, pydantic.Field(ge=0)] = 0

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except pydantic.ValidationError as error:
            raise explain(error, type(self), "weights") from None
        if self.coarse is not None and not 0 <= self.bits - self.coarse <= 4:
            raise ConfigError(f"weights: coarse={self.coarse} of bits={self.bits}: from 0 to 4 others must be left")
        if self.coarse is not None and self.group % 64:
            raise ConfigError(f"weights: group={self.group} must be a multiple of 64 for neurons in two planes")


class SparsityConfig(QuantizationConfigMixin):
    """The ``quantization_config`` entry of a sparse model's ``config.json``.

    Args:
        method: the method's config.
        lte_version: version of this package that wrote the checkpoint; informative.
        operating_points: what :meth:`set_sparsity <lte.thresholds.set_sparsity>` chooses from, by sparsity.
        weights: how they are stored where they are of few bits.
    """

    def __init__(
        self,
        method: MethodConfig,
        lte_version: str,
        *,
        operating_points: Iterable[OperatingPoint] = (),
        weights: WeightsConfig | None = None,
    ) -> None:
        self.quant_method = QUANT_METHOD
        self.method = method
        self.lte_version = lte_version
        self.operating_points = sorted(operating_points, key=lambda point: point.sparsity)
        self.weights = weights

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Read the entry back; CheckpointError where it is of another version, incomplete or edited."""
        values = dict(config_dict)
        version = values.pop("format_version", None)
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"config.json: quantization_config.format_version={version!r}, but this version of lte reads "
                f"{FORMAT_VERSION}; install the lte version that wrote it ({values.get('lte_version', 'unknown')})"
            )
        values.pop("quant_method", None)
        lte_version = values.pop("lte_version", "unknown")
        weights = values.pop("weights", None)
        try:
            if weights is not None and not isinstance(weights, dict):
                raise ConfigError(f"weights={weights!r} is no mapping")
            points = {"operating_points": values.pop("operating_points", ())}
            dial = validate_model(_Dial, points, "operating_points")
            config = cls(
                method_config(values.pop("method", "missing"), values),
                lte_version,
                operating_points=dial.operating_points,
                weights=None if weights is None else WeightsConfig(**weights),
            )
        except ConfigError as error:
            raise CheckpointError(f"config.json: quantization_config: {error}") from None
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """What goes into ``config.json``."""
        return {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "lte_version": self.lte_version,
            "method": self.method.method,
            **self.method.model_dump(mode="json"),
            **(
                {"operating_points": [p.model_dump(mode="json") for p in points]}
                if (points := self.operating_points)
                else {}
            ),
            **({} if self.weights is None else {"weights": self.weights.model_dump(mode="json")}),
        }

    def to_diff_dict(self) -> dict[str, Any]:
        """The same as :meth:`to_dict`: a checkpoint should not depend on the defaults of a later version."""
        return self.to_dict()


class _Dial(pydantic.BaseModel):
    """What ``config.json`` says about thresholds other than those a model runs at."""

    operating_points: tuple[OperatingPoint, ...] = ()


def validate_model(cls: type[ModelT], values: Any, what: str) -> ModelT:
    """``cls.model_validate(values)`` with pydantic's errors told by :func:`explain`."""
    try:
        return cls.model_validate(values)
    except pydantic.ValidationError as error:
        raise explain(error, cls, what) from None


def explain(error: pydantic.ValidationError, cls: type[pydantic.BaseModel], what: str) -> ConfigError:
    """A one-line ConfigError that names each key, its value and the way out."""
    return ConfigError(f"{what}: " + "; ".join(_one_line(item, cls) for item in error.errors()))


def _one_line(item: Any, cls: type[pydantic.BaseModel]) -> str:
    key = ".".join(str(part) for part in item["loc"]) or "value"
    if item["type"] == "missing":
        return f"{key} is missing"
    if item["type"] != "extra_forbidden":
        return f"{key}={item['input']!r}: {item['msg']}"
    known = _known_keys(cls, item["loc"])
    near = difflib.get_close_matches(str(item["loc"][-1]), known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
    return f"unknown key {key!r}; {hint}"


def _known_keys(cls: type[pydantic.BaseModel], loc: tuple[Any, ...]) -> list[str]:
    current: Any = cls
    for key in loc[:-1]:
        current = current.model_fields[key].annotation
    return list(current.model_fields)
