"""Which policy serves which architecture: one line a family."""

from collections.abc import Iterable
from difflib import SequenceMatcher

from .bloom import BLOOM
from .cohere import COHERE, COHERE2
from .deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from .falcon import FALCON
from .gemma import GEMMA, GEMMA2, GEMMA3
from .glm import GLM, GLM4
from .gpt2 import GPT2
from .gpt_neox import GPT_NEOX
from .gpt_oss import GPT_OSS
from .gptj import GPTJ
from .granite import GRANITE
from .llama import LLAMA
from .mistral import MISTRAL
from .mixtral import MIXTRAL
from .olmo2 import OLMO2
from .opt import OPT
from .phi3 import PHI3
from .policy import Policy
from .qwen2 import QWEN2
from .qwen3 import QWEN3
from .qwen_moe import QWEN2_MOE, QWEN3_MOE
from .smollm3 import SMOLLM3
from .starcoder2 import STARCODER2

POLICIES: tuple[Policy, ...] = (
    BLOOM,
    COHERE,
    COHERE2,
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    FALCON,
    GEMMA,
    GEMMA2,
    GEMMA3,
    GLM,
    GLM4,
    GPT2,
    GPT_NEOX,
    GPTJ,
    GPT_OSS,
    GRANITE,
    LLAMA,
    MISTRAL,
    MIXTRAL,
    OLMO2,
    OPT,
    PHI3,
    QWEN2,
    QWEN3,
    QWEN2_MOE,
    QWEN3_MOE,
    SMOLLM3,
    STARCODER2,
)


def supported_architectures() -> list[str]:
    return sorted(name for policy in POLICIES for name in policy.architectures)


def find_policy(architectures: Iterable[str]) -> Policy:
    """The policy for a config's `architectures`. Raises ValueError naming the nearest supported ones."""
    wanted = list(architectures)
    for policy in POLICIES:
        if any(name in policy.architectures for name in wanted):
            return policy
    if not wanted:
        raise ValueError("config.json names no architecture")
    raise ValueError(f"architecture {', '.join(wanted)} is not supported; {nearest_supported(wanted[0])}")


def has_policy(architectures: Iterable[str]) -> bool:
    return not {name for policy in POLICIES for name in policy.architectures}.isdisjoint(architectures)


def nearest_supported(architecture: str) -> str:
    """The architectures with a policy whose names are most like this one."""
    stem = _stem(architecture)
    nearest = sorted(supported_architectures(), key=lambda name: -SequenceMatcher(None, _stem(name), stem).ratio())
    return f"nearest supported: {', '.join(nearest[:3])}"


def _stem(architecture: str) -> str:
    """Without what nearly all names end in."""
    return architecture.removesuffix("ForCausalLM").removesuffix("LMHeadModel").lower()
