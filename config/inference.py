"""`InferenceConfig`: how a model is run, gathered from constructor > environment > file > default."""

import math
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import ByteSize, Field, PrivateAttr, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    InitSettingsSource,
    JsonConfigSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
    YamlConfigSettingsSource,
)

from .errors import ConfigError, nearest, one_line, refuse_bool
from .speculative import SpeculativeConfig, as_speculative_config

if TYPE_CHECKING:
    Bytes = int  # callers may pass any integer
else:
    Bytes = ByteSize  # reads "2GiB" too

_ENV_PREFIX = "MESHLM_"
_OTHER_VARIABLES = ("meshlm_cache", "meshlm_api_key", "meshlm_peers")  # read elsewhere, the last by benchmarks
_KV_SIZES = ("kv_memory_fraction", "kv_memory_bytes", "num_kv_blocks")
_FILE_SOURCES: dict[str, type[InitSettingsSource]] = {
    ".yaml": YamlConfigSettingsSource,
    ".yml": YamlConfigSettingsSource,
    ".toml": TomlConfigSettingsSource,
    ".json": JsonConfigSettingsSource,
}


class InferenceConfig(BaseSettings):
    """How a model is run: mesh, numbers, memory, scheduling.

    Each field comes from the constructor, else the environment (`MESHLM_TP_SIZE=2`; `none` stands for None), else the
    file given to `from_file`, else its default; `describe()` says which. Raises ConfigError, one line for one mistake.
    """

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        env_prefix=_ENV_PREFIX,
        env_ignore_empty=True,
        env_parse_none_str="none",
    )

    tp_size: int = Field(default=1, ge=1, description="ranks that share each layer (tensor parallelism)")
    pp_size: int = Field(default=1, ge=1, description="stages that the layers are divided into (pipeline parallelism)")
    dp_size: int = Field(default=1, ge=1, description="replicas of the model (data parallelism)")

    expert_parallel: bool = Field(
        default=False,
        description="the ranks of tp_size hold whole experts of a mixture of experts, instead of a part of each",
    )

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="type of weights and activations; auto: the checkpoint's"
    )
    device: str = Field(
        default="auto",
        description="auto, cpu, cuda or cuda:N; auto: cuda where there is a device for every rank on the host",
    )
    policy: Literal["auto", "generic"] = Field(
        default="auto",
        description="whose layers; auto: ours where the model's family has a policy, else transformers' own; generic: "
        "transformers' own, divided by its tables, for every family",
    )
    attention_backend: str = Field(
        default="auto",
        description="name of an attention backend; auto: the one known to be fastest of those that work; tuned: the "
        "one that is fastest when timed on this model's shapes, which takes seconds once and is kept in a file",
    )

    max_model_len: int | None = Field(
        default=None, ge=1, description="tokens, prompt and output together; None: the model's own limit"
    )
    block_size: int | None = Field(
        default=None, ge=1, description="tokens in a block of KV cache; None: what the backend prefers"
    )
    kv_memory_fraction: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="share of the memory left after loading that the KV cache takes, on each rank",
    )
    kv_memory_bytes: Bytes | None = Field(default=None, gt=0, description="bytes of KV cache on each rank, or '2GiB'")
    num_kv_blocks: int | None = Field(default=None, ge=1, description="blocks of KV cache in each replica")

    max_num_seqs: int = Field(default=256, ge=1, description="sequences that run at once in a replica")
    max_num_batched_tokens: int = Field(
        default=2048, ge=1, description="tokens computed in one step of a replica; longer prompts are split over steps"
    )
    async_scheduling: bool | None = Field(
        default=None,
        description="schedule each step while the one before it runs, whose tokens are not known yet; on GPUs it needs "
        "pp_size=1; None: where it pays, on a GPU or several ranks",
    )
    cuda_graphs: bool | None = Field(
        default=None,
        description="steps of one token for each sequence run from CUDA graphs, captured at the start; None: on a GPU, "
        "where the attention backend allows it; on a CPU such steps are recorded as they come, unless this is False",
    )
    enable_prefix_caching: bool = Field(default=True, description="reuse the KV cache of equal prompt beginnings")
    speculative: SpeculativeConfig | None = Field(
        default=None,
        description="speculative decoding: who guesses tokens ahead; a method's name, or fields of SpeculativeConfig; "
        "steps are not scheduled ahead then",
    )

    allow_pickle: bool = Field(
        default=False,
        description="read .bin files where a model has no others: unpickling can execute code from the file. Only "
        "torch's restricted unpickler (weights_only) is used, which builds tensors and calls nothing that the file "
        "names, but allow it for files that you trust",
    )
    trust_remote_code: bool = Field(
        default=False,
        description="run Python code that a model's directory brings, for a model or tokenizer that transformers lacks",
    )

    seed: int = Field(default=0, ge=0, le=2**63 - 1, description="seed of requests that bring none of their own")
    start_timeout_s: float = Field(default=120.0, gt=0, description="seconds for all ranks to start and meet")
    collective_timeout_s: float = Field(default=300.0, gt=0, description="seconds for one collective between ranks")

    _origins: dict[str, str] = PrivateAttr(default_factory=dict)  # field -> where its value came from, if not default

    if not TYPE_CHECKING:  # type checkers see the field-by-field signature that pydantic declares

        def __init__(self, **values: Any) -> None:
            origins: dict[str, str] = {}  # filled by settings_customise_sources
            try:
                super().__init__(_origins=origins, **values)
            except ValidationError as error:
                raise one_line(error, type(self), origins) from None
            self._origins = origins

    @classmethod
    def from_file(cls, path: str | Path, **overrides: Any) -> Self:
        """Reads YAML, TOML or JSON, by suffix. The environment stands above the file, `overrides` above both."""
        path = Path(path)
        source = _FILE_SOURCES.get(path.suffix.lower())
        if source is None:
            raise ConfigError(f"{path}: suffix {path.suffix!r} is not one of {', '.join(_FILE_SOURCES)}")
        if not path.is_file():
            raise ConfigError(f"{path}: no such file")
        try:
            file = source(cls, path)  # type: ignore[arg-type]  # each reads its file as it is built
        except Exception as error:  # each of the three parsers has its own
            raise ConfigError(f"{path}: cannot be read as a table of fields: {' '.join(str(error).split())}") from error
        return cls(**{"_file": (file, path), **overrides})

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The sources, strongest first, noting in `_origins` which one each field is taken from.

        Three private constructor arguments steer it: `_origins`, filled here; `_file`, the (source, path) of
        `from_file`; `_alone`, for `replace`: the constructor is the only source.
        """
        values = init_settings()
        origins, file = values.pop("_origins"), values.pop("_file", None)
        if values.pop("_alone", False):
            return (init_settings,)
        labelled = [(init_settings, "constructor"), (env_settings, f"environment {_ENV_PREFIX}")]
        if file is not None:
            labelled.append((file[0], f"file {file[1]}"))
        for source, label in labelled:
            for name in source():
                origins.setdefault(name, label + name.upper() if source is env_settings else label)
        _warn_unknown(env_settings, cls)
        return tuple(source for source, _ in labelled)

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        return refuse_bool(cls, value, str(info.field_name))

    @field_validator("speculative", mode="before")
    @classmethod
    def _method_alone(cls, value: Any) -> Any:
        return as_speculative_config(value)

    @field_validator("device")
    @classmethod
    def _known_device(cls, device: str) -> str:
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
            raise ValueError("must be auto, cpu, cuda or cuda:N")
        return device

    @model_validator(mode="after")
    def _one_kv_size(self) -> Self:
        given = [f"{name}={getattr(self, name)}" for name in _KV_SIZES if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} each fix the size of the KV cache: give at most one")
        return self

    @property
    def mesh_shape(self) -> tuple[int, int, int]:
        """(dp_size, pp_size, tp_size), tp innermost."""
        return self.dp_size, self.pp_size, self.tp_size

    @property
    def world_size(self) -> int:
        """Ranks in the whole mesh."""
        return math.prod(self.mesh_shape)

    def replace(self, **changes: Any) -> Self:
        """A validated copy with `changes`; all else keeps its value and origin, whatever the environment says now."""
        changed = type(self)(**{"_alone": True, **dict(self), **changes})
        changed._origins = self._origins | dict.fromkeys(changes, "constructor")
        return changed

    __replace__ = replace  # copy.replace, Python >= 3.13

    def describe(self) -> str:
        """A table: field, value, where the value came from."""
        rows = [(name, str(value), self._origins.get(name, "default")) for name, value in self]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        )

    def __eq__(self, other: object) -> bool:  # by values; where they came from does not count
        return isinstance(other, InferenceConfig) and self.__dict__ == other.__dict__

    def __hash__(self) -> int:
        return hash(tuple(self.__dict__.values()))


def _warn_unknown(env_settings: PydanticBaseSettingsSource, config: type[InferenceConfig]) -> None:
    assert isinstance(env_settings, EnvSettingsSource)
    known = [_ENV_PREFIX.lower() + name for name in config.model_fields]
    for variable in env_settings.env_vars:  # lower case
        if variable.startswith(_ENV_PREFIX.lower()) and variable not in (*known, *_OTHER_VARIABLES):
            message = f"environment variable {variable.upper()} is not known and has no effect; "
            message += f"the nearest known one is {nearest(variable, known).upper()}"
            warnings.warn(message, stacklevel=6)  # the caller of InferenceConfig()
