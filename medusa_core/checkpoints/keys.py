"""Names of Medusa heads' tensors in layouts A to E: how each layout spells its keys."""

import re
from dataclasses import dataclass

HEAD_PREFIX = "medusa_head."  # layout C: heads among a whole model's weights
MODELOPT_PREFIX = "medusa_heads."  # layout E, and optionally D
TOKEN_MAP = "token_map"  # noqa: S105  # nosec B105


@dataclass(frozen=True, slots=True)
class Naming:
    """A layout's key templates; `{layer}` of an output layer is the number of blocks."""

    title: str
    pattern: re.Pattern[str]  # groups: head, layer, part (of a block) or output
    block: str
    output: str
    token_map: str
    example: str


def _dotted(prefix: str, title: str) -> Naming:
    pattern = (
        re.escape(prefix)
        + r"(?P<head>\d{1,9})\.(?P<layer>\d{1,9})\.(?:linear\.(?P<part>weight|bias)|(?P<output>weight))"
    )
    block, output = prefix + "{head}.{layer}.linear.{part}", prefix + "{head}.{layer}.weight"
    return Naming(title, re.compile(pattern), block, output, prefix + TOKEN_MAP, prefix + "0.0.linear.weight")


PLAIN = _dotted("", "Medusa heads")
IN_MODEL = _dotted(HEAD_PREFIX, "Medusa heads of a whole model")
MODELOPT = _dotted(MODELOPT_PREFIX, "the ModelOpt / TensorRT-LLM layout")
VLLM = Naming(
    title="vLLM's own Medusa layout",
    pattern=re.compile(
        r"(?P<output>lm_heads\.)?(?(output)|blocks\.)(?P<head>\d{1,9})\."
        r"(?(output)|layers\.(?P<layer>\d{1,9})\.)(?P<part>weight|bias)"
    ),
    block="blocks.{head}.layers.{layer}.{part}",
    output="lm_heads.{head}.weight",
    token_map=TOKEN_MAP,
    example="blocks.0.layers.0.weight",
)
VLLM_KEY = re.compile(rf"(?:{re.escape(MODELOPT_PREFIX)})?(?:blocks\.\d+\.layers|lm_heads\.\d+)\..*")


def is_vllm_key(key: str) -> bool:
    """Whether only layout D has such a key, with or without its optional prefix."""
    return VLLM_KEY.fullmatch(key) is not None


@dataclass(frozen=True, slots=True)
class HeadLayout:
    """K heads of L blocks. `num_outputs`: K, 1 for all heads together, or 0 for the backbone's."""

    naming: Naming
    num_heads: int
    num_layers: int
    num_outputs: int
    has_bias: bool = True
    has_token_map: bool = False

    def block_key(self, head: int, layer: int, part: str) -> str:
        return self.naming.block.format(head=head, layer=layer, part=part)

    def output_key(self, head: int) -> str:
        return self.naming.output.format(head=head, layer=self.num_layers)

    def block_keys(self, part: str) -> set[str]:
        """The key of that part ("weight" or "bias") of every block."""
        places = [(head, layer) for head in range(self.num_heads) for layer in range(self.num_layers)]
        return {self.block_key(head, layer, part) for head, layer in places}

    def output_keys(self) -> list[str]:
        return [self.output_key(head) for head in range(self.num_outputs)]

    def keys(self) -> set[str]:
        """Every key such a file must have, and no other."""
        biases = self.block_keys("bias") if self.has_bias else set()
        token_map = {self.naming.token_map} if self.has_token_map else set()
        return self.block_keys("weight") | biases | {*self.output_keys()} | token_map
