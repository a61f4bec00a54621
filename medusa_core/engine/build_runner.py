"""Chooses what runs an engine's steps: programs of static shapes on a CPU, else the eager runner."""

import logging

import torch

from medusa_core.config import EngineConfig
from medusa_core.draft.head_source import HeadSource
from medusa_core.draft.head_stack import HeadStack
from medusa_core.draft.head_trees import DYNAMIC
from medusa_core.engine.compilation import Compilation
from medusa_core.engine.runner import EagerRunner, Runner
from medusa_core.engine.self_check import SelfCheck
from medusa_core.engine.static_model import pack_weights, prepare_static
from medusa_core.engine.static_runner import StaticRunner
from medusa_core.loading.progress import LoadProgress
from medusa_core.model.backbone import Backbone
from medusa_core.model.kv_cache import KVCache
from medusa_core.programs.switch import Switch

logger = logging.getLogger(__name__)

DRAFT_SIZES = (16, 8, 12, 24, 32)  # trees that are drafted by compiled programs


def build_runner(
    backbone: Backbone,
    cache: KVCache,
    source: HeadSource | None,
    config: EngineConfig,
    compilation: Compilation,
    progress: LoadProgress,
) -> Runner:
    """Also gives the model another attention and packed weights, on a CPU."""
    eager = EagerRunner(backbone, cache)
    if backbone.device.type != "cpu":
        return eager
    heads = source.heads if source else None
    reason = prepare_static(backbone, heads, reproducible=config.reproducible)
    if reason is not None:
        logger.warning("the step runs eagerly, and uncompiled: %s", reason)
        return eager
    runner = StaticRunner(backbone, cache)
    switches = [*runner.programs, *_draft_switches(source, config)]
    if config.compile == "on":
        progress.enter("compiling the step, unless that was done before")
        compilation.compile(switches)
    pack_weights(backbone, heads)
    for switch in switches:
        compilation.add(switch)
    if source is not None and isinstance(heads, HeadStack):
        source.trees.on_new(compilation.add)
    check_programs(runner, backbone, config)
    return runner


def check_programs(runner: Runner, backbone: Backbone, config: EngineConfig) -> None:
    """Drop a compiled step that is wrong; warn if text may depend on trees here."""
    if not isinstance(runner, StaticRunner):
        return
    verify = runner.programs[0]
    check = SelfCheck(verify, backbone)
    if verify.compiled is not None:
        check.drop_wrong_program()
    in_16_bits = backbone.dtype != torch.float32
    if in_16_bits and config.reproducible and not check.rows_are_the_same_anywhere():
        logger.warning(
            "this processor rounds differently for trees of different sizes: at near-ties the text may "
            "depend on them"
        )


def _draft_switches(source: HeadSource | None, config: EngineConfig) -> list[Switch]:
    """Of the trees that requests are given where they name none; heads of others run as they are."""
    if source is None or not isinstance(source.heads, HeadStack):
        return []
    sizes = DRAFT_SIZES if config.tree_nodes is None else (config.tree_nodes,)
    reader = getattr(source.heads, "reader", None)
    drafters = [source.trees.drafter(DYNAMIC, nodes).run for nodes in sizes if nodes > 1]
    return drafters if reader is None else [reader.run, *drafters]
