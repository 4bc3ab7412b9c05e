"""The methods that train.py trains, with the same loop, data, anomalies, metrics and files.

METHODS lists them. A method is built from the run's Settings and has the interface of
`transfusion.Method`. The PRESETS of a method other than TransFusion are its differences from
TransFusion's presets, and its USES are the optional flags that it accepts.
"""
from collections.abc import Callable
from typing import NamedTuple

from baselines.anoddpm import AnoDDPM
from baselines.d3ad import D3AD
from baselines.diffad import DiffAD
from baselines.draem import Draem
from baselines.patchcore import PatchCore
from support.console import InputError
from transfusion import Method, TransFusion


class Entry(NamedTuple):
    """build: creates the method from Settings. presets, uses: its PRESETS and USES; None for
    TransFusion, which has the presets of settings.py and all flags except "other methods". trains:
    its TRAINS.
    """
    build: Callable[..., Method]
    presets: dict[str, dict] | None = None
    uses: set[str] | None = None
    trains: bool = True


def transfusion(s) -> TransFusion:
    """TransFusion with these settings. Raises InputError if T is too small."""
    try:
        return TransFusion(s.channels, s.T, s.schedule, s.pe, guide=s.sim_mask,
                           authors_schedule=s.authors_schedule, anomaly_target=s.anomaly_target,
                           soft_consistency=s.soft_consistency, bf16=s.precision == "bf16",
                           attention_norm=s.attention_norm, time_after_norm=s.time_after_norm,
                           recompute=s.recompute, side=s.crop)
    except ValueError as error:
        raise InputError(f"--T {s.T}: {error}")


METHODS = {"transfusion": Entry(transfusion),
           **{name: Entry(cls, cls.PRESETS, cls.USES, cls.TRAINS) for name, cls in (
               ("draem", Draem), ("anoddpm", AnoDDPM), ("diffad", DiffAD), ("d3ad", D3AD),
               ("patchcore", PatchCore))}}

# Flags outside the group "method" that another method accepts only if its USES names them.
OPTIONAL_FLAGS = {"attention_norm", "time_after_norm", "anomalous", "grow", "init", "recompute",
                  "compile", "infer_steps", "lam", "final_mask"}
# What other methods do not take over from TransFusion's presets.
OURS_ALONE = {"grow": "", "anomalous": 0.5, "muon": False, "time_after_norm": False}
# Flags of the group "training" that a method without training accepts.
DATA_FLAGS = {"resize", "crop", "foreground", "hold_out"}


def accepts_flag(method: str, flag: str, group: str) -> bool:
    """Whether a method accepts a flag; group: the flag's group in settings.py."""
    uses = METHODS[method].uses
    if uses is None:
        return group != "other methods"
    if group == "training" and not METHODS[method].trains and flag not in DATA_FLAGS:
        return False
    return flag in uses or flag not in OPTIONAL_FLAGS and group not in ("method", "other methods")
