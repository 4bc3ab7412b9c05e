"""The methods that train.py trains, on one loop and the same data, anomalies, metrics and files.

METHODS is the one place that names them. What a method is called with are the run's Settings; what
it gives is a Module with this interface, TransFusion's (transfusion.py):

    last_step                              batches come with t drawn from 1..last_step
    losses(x, eps, M, M_a, t, drop="")     {"loss": ..., and its terms, the same at every step};
                                           drop is --drop-loss, "" where the method has no use of it
    path(infer_steps)                      the steps of a restoration, one more than network calls
    restore(x, infer_steps)                a Restoration: x_0 and the maps for Eq. 10

and, where it has use of it (TransFusion has not):

    STAGES           shares of the steps at which its stages end, as (0.4, 0.8, 1.0); the learning
                     rate runs through its schedule in each; `stage` is set to the stage, from 0
    prepare(images)  called once after the training, with training images [N, 3, H, W] in [-1, 1];
                     what it finds goes to buffers whose shapes are known from the start

A method other than TransFusion says in PRESETS how each preset differs from TransFusion's, and in
USES which of the flags that not all methods have mean something to it.
"""
from baselines.anoddpm import AnoDDPM
from baselines.d3ad import D3AD
from baselines.diffad import DiffAD
from baselines.draem import Draem
from transfusion import TransFusion


def transfusion(s) -> TransFusion:
    """Raises ValueError for a T too small."""
    try:
        return TransFusion(s.channels, s.T, s.schedule, s.pe, guide=s.sim_mask,
                           authors_schedule=s.authors_schedule, anomaly_target=s.anomaly_target,
                           soft_consistency=s.soft_consistency, bf16=s.precision == "bf16",
                           attention_norm=s.attention_norm, recompute=s.recompute)
    except ValueError as error:
        raise ValueError(f"--T {s.T}: {error}")


METHODS = {"transfusion": transfusion, "draem": Draem, "anoddpm": AnoDDPM,
           "diffad": DiffAD, "d3ad": D3AD}

# Flags of all groups that are TransFusion's, and another method's only where its USES says so; so
# are all of the group "method".
NOT_OF_ALL = {"attention_norm", "init", "recompute", "compile", "infer_steps", "lam", "final_mask"}


def presets(method: str) -> dict[str, dict] | None:
    """How the presets of a method differ from TransFusion's; None for TransFusion."""
    return getattr(METHODS[method], "PRESETS", None)


def has_use_of(method: str, flag: str, group: str) -> bool:
    """Whether a flag, of a group of settings.py, means something to a method."""
    uses = getattr(METHODS[method], "USES", None)
    if uses is None:
        return group != "other methods"
    return flag in uses or flag not in NOT_OF_ALL and group not in ("method", "other methods")
