"""The methods that train.py trains, with the same loop, data, anomalies, metrics and files.

METHODS is the one place that names them. Each is built from the run's Settings and has the
interface of `transfusion.Method`. A method other than TransFusion says in PRESETS how each preset
differs from TransFusion's, and in USES which of the optional flags mean something to it.
"""
from collections.abc import Callable
from typing import NamedTuple

from baselines.anoddpm import AnoDDPM
from baselines.d3ad import D3AD
from baselines.diffad import DiffAD
from baselines.draem import Draem
from transfusion import Method, TransFusion


class Entry(NamedTuple):
    """build: from Settings to the method. presets, uses: PRESETS and USES; None for TransFusion,
    whose presets are those of settings.py and whose flags are all but the group "other methods".
    """
    build: Callable[..., Method]
    presets: dict[str, dict] | None = None
    uses: set[str] | None = None


def transfusion(s) -> TransFusion:
    """TransFusion with these settings. Raises ValueError for a T too small."""
    try:
        return TransFusion(s.channels, s.T, s.schedule, s.pe, guide=s.sim_mask,
                           authors_schedule=s.authors_schedule, anomaly_target=s.anomaly_target,
                           soft_consistency=s.soft_consistency, bf16=s.precision == "bf16",
                           attention_norm=s.attention_norm, recompute=s.recompute)
    except ValueError as error:
        raise ValueError(f"--T {s.T}: {error}")


METHODS = {"transfusion": Entry(transfusion),
           **{name: Entry(cls, cls.PRESETS, cls.USES) for name, cls in (
               ("draem", Draem), ("anoddpm", AnoDDPM), ("diffad", DiffAD), ("d3ad", D3AD))}}

# Flags outside the group "method" that another method accepts only where its USES names them.
OPTIONAL_FLAGS = {"attention_norm", "init", "recompute", "compile", "infer_steps", "lam",
                  "final_mask"}


def accepts_flag(method: str, flag: str, group: str) -> bool:
    """Whether a flag, of a group of settings.py, means something to a method."""
    uses = METHODS[method].uses
    if uses is None:
        return group != "other methods"
    return flag in uses or flag not in OPTIONAL_FLAGS and group not in ("method", "other methods")
