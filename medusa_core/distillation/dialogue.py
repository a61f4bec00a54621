"""Re-asks one dialogue: every user turn in order, with the new answers as context."""

import hashlib
from dataclasses import dataclass

from medusa_core.distillation.answers import Answerer
from medusa_core.distillation.seeds import Message, SeedDialogue
from medusa_core.distillation.settings import DistillSettings

SEED_BYTES = 8
SEED_MASK = 2**63 - 1  # OpenAI's seed is a signed 64-bit number


@dataclass(frozen=True, slots=True)
class Reasked:
    """`messages` end with a complete answer, or are empty. `cut`: why turns are missing, None if none are."""

    messages: tuple[Message, ...]
    answers: int
    tokens: int
    cut: str | None = None


async def reask(dialogue: SeedDialogue, answerer: Answerer, settings: DistillSettings) -> Reasked:
    """Multi-turn re-asking (Medusa paper §2.3.2), up to the first answer the model does not end itself.

    That answer, its question and all that follows are left out: heads must not learn to go on where the model
    was cut off. An empty answer ends the dialogue too. Raises what the answerer raises.
    """
    messages: tuple[Message, ...] = ()
    tokens = 0
    groups = dialogue.groups[: settings.turns]
    for turn, group in enumerate(groups):
        asked = messages + group
        reply = await answerer.answer(asked, answer_seed(settings.seed, dialogue.row, turn))
        cut = reply.cut if reply.text.strip() or reply.cut else "empty answer"
        if cut is not None:
            return Reasked(messages, turn, tokens, cut)
        tokens += reply.tokens
        messages = (*asked, {"role": "assistant", "content": reply.text})
    return Reasked(messages, len(groups), tokens)


def answer_seed(seed: int, row: int, turn: int) -> int:
    """63 bits from run, row and turn alone, so that order and resuming do not change an answer."""
    digest = hashlib.blake2b(f"{seed}/{row}/{turn}".encode(), digest_size=SEED_BYTES).digest()
    return int.from_bytes(digest) & SEED_MASK
