"""The other methods: their equations against plain loops, and all of them through one loop."""
import dataclasses

import pytest
import torch

import runs
import settings
import train


# ---------------------------------------------------------------- what methods.py promises

def test_a_run_of_another_method_has_a_folder_of_its_own():
    s = settings.Settings(category="fabric")
    other = dataclasses.replace(s, method="draem")
    assert [runs.run_folder(one).as_posix() for one in (
        s, other, dataclasses.replace(s, name="a"), dataclasses.replace(other, name="a"))] == [
        f"runs/demo/fabric{end}" for end in ("", "-draem", "-a", "-draem-a")]


def test_stages_share_the_steps():
    model = torch.nn.Module()
    assert train.find_stage(model, 7, 10) == (0, 7, 10)
    model.STAGES = (0.4, 0.8, 1.0)
    found = [train.find_stage(model, step, 10) for step in range(10)]
    assert [stage for stage, _, _ in found] == [0] * 4 + [1] * 4 + [2] * 2
    assert [place for _, place, _ in found] == [0, 1, 2, 3] * 2 + [0, 1]
    assert [length for _, _, length in found] == [4] * 8 + [2] * 2


def test_a_checkpoint_without_a_method_is_transfusions(tmp_path):
    s = settings.Settings(channels=8)
    runs.save_checkpoint(tmp_path / "last.pt", s, runs.build_model(s), None, None,
                         runs.new_progress())
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    del state["settings"]["method"]
    torch.save(state, tmp_path / "last.pt")
    model, s, _ = runs.load_model(tmp_path / "last.pt", torch.device("cpu"))
    assert s.method == "transfusion" and isinstance(model, train.TransFusion)
    with pytest.raises(settings.InputError, match="^method later: not known here"):
        runs.build_model(dataclasses.replace(s, method="later"))
