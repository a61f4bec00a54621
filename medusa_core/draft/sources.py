"""The draft sources of an engine, by the name that a request asks for."""

from collections.abc import Mapping

from medusa_core.draft.head_source import HeadSource
from medusa_core.draft.merged import MergedSource
from medusa_core.draft.ngram import NgramSource
from medusa_core.draft.source import DraftSource
from medusa_core.sampling_params import DraftSourceName


def build_sources(heads: HeadSource | None) -> Mapping[DraftSourceName, DraftSource]:
    """Without heads there are n-grams alone."""
    ngrams = NgramSource()
    if heads is None:
        return {DraftSourceName.NGRAM: ngrams}
    return {
        DraftSourceName.HEADS: heads,
        DraftSourceName.NGRAM: ngrams,
        DraftSourceName.BOTH: MergedSource(heads, ngrams),
    }
