"""Table 4: the trainings of ablations.py, its files and its table."""
import json
import shutil

import pytest

import ablations
import evaluate
import tables
import train
from helpers import argv_for, rows_of


def test_the_papers_rows_and_the_full_models_seeds():
    flags = [flag for _, flag, _ in ablations.conditions()]
    assert flags[:3] == ["", "", ""] and len(set(flags[3:])) == len(flags[3:]) == 14
    assert [seed for _, _, seed in ablations.conditions()][:4] == ["0", "1", "2", "0"]


def test_a_table_is_made_once(parts, monkeypatch, capsys):
    rows = [row for row in ablations.conditions() if row[1] in ("", "--no-pe", "--T 5",
                                                               "--final-mask recon")]
    monkeypatch.setattr(ablations, "conditions", lambda: rows)
    argv = argv_for(parts, "--steps", "2", "--infer-steps", "1")
    assert ablations.main(argv) == 0
    folder = parts.parent / "runs"
    table = rows_of(folder / "table4-parts-bolt.csv")
    assert [r["condition"] for r in table] == 3 * ["full model"] + ["without PE", "only M_recon",
                                                                    "5 steps"]
    runs = {path.parent.name for path in (folder / "parts").glob("*/metrics.json")}
    assert runs == {"bolt-seed-0", "bolt-seed-1", "bolt-seed-2", "bolt-no-pe", "bolt-T-5"}
    assert (folder / "parts" / "bolt-seed-0" / "metrics-final_maskrecon.json").exists()

    monkeypatch.setattr(train, "train", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr(evaluate, "write_results", lambda *_: pytest.fail("scored again"))
    capsys.readouterr()
    assert ablations.main(argv) == 0
    assert "Table 4" in capsys.readouterr().out


@pytest.mark.parametrize("flags, expected", [
    (["--seed", "1"], "--seed"), (["--category", ""], "--category"),
    (["--category", "blot"], "bolt")])
def test_mistakes_are_refused_before_the_first_training(parts, flags, expected, capsys):
    assert ablations.main(argv_for(parts, *flags)) == 2
    assert expected in capsys.readouterr().err
    shutil.rmtree(parts / "bolt" / "ground_truth")
    assert ablations.main(argv_for(parts)) == 2
    assert "ground truth" in capsys.readouterr().err
    assert not (parts.parent / "runs").exists()


def test_differences_are_to_the_mean_of_the_seeds():
    rows = [{"data": "demo", "category": "gear", "step": 1, "condition": condition, "seed": seed,
             "image_auroc": a, "aupro": b}
            for condition, seed, a, b in (("full model", "0", "0.8", "0.5"),
                                          ("full model", "1", "0.9", "0.7"),
                                          ("without PE", "0", "0.80", "0.65"),
                                          ("only M_recon", "0", "0.70", "0.40"))]
    table = tables.table4(rows)
    by_condition = {row[1]: row[6:8] for row in table.rows}
    assert by_condition["without PE"] == ["-5.0", "+5.0"]
    assert by_condition["only M_recon"] == ["-10.0=", "-10.0="]         # to the same seed
    assert by_condition["TransFusion"] == ["85.0 ± 7.1", "60.0 ± 14.1"]
    assert by_condition["root"] == ["not run", "not run"]
    assert "ours on demo gear" in table.title
    fabric = [{**row, "category": "fabric", "image_auroc": float(row["image_auroc"]) - 0.1,
               "aupro": float(row["aupro"]) + 0.05 * (row["condition"] == "without PE")}
              for row in rows]
    table = tables.table4(rows + fabric)                                 # averages of both
    by_condition = {row[1]: row[6:8] for row in table.rows}
    assert by_condition["without PE"] == ["-5.0", "+7.5"]
    assert by_condition["TransFusion"] == ["80.0 ± 7.1", "60.0 ± 14.1"]
    assert "average of fabric, gear" in table.title


def test_differences_beyond_the_noise_are_marked():
    """Three seeds of 89, 90 and 91 %: a deviation of 1, so 4.303 sqrt(4 / 3) = 4.97 points count."""
    def row(condition, seed, value):
        return {"data": "demo", "category": "gear", "step": 1, "condition": condition,
                "seed": seed, "image_auroc": value, "aupro": value}

    rows = [row("full model", str(k), 0.89 + 0.01 * k) for k in range(3)]
    rows += [row("without PE", "0", 0.8509), row("without L_n", "0", 0.8497)]
    by_condition = {line[1]: line[6] for line in tables.table4(rows).rows}
    assert by_condition["without PE"] == "-4.9" and by_condition["without L_n"] == "-5.0*"
    assert "5.0 points det" in tables.table4(rows).note


def test_all_categories_give_a_table_each_and_their_average(parts, monkeypatch, capsys):
    shutil.copytree(parts / "bolt", parts / "nut")
    monkeypatch.setattr(ablations, "conditions", lambda: [("full model", "", "0"),
                                                          ("only M_1", "--final-mask last", "0")])
    argv = argv_for(parts, "--steps", "2", "--T", "5", "--infer-steps", "0")
    argv[argv.index("bolt")] = "all"
    assert ablations.main(argv) == 0
    printed = capsys.readouterr().out
    assert printed.index("2 x 1 trainings, bolt nut") < printed.index("--- bolt, 1 of 2")
    assert {p.name for p in (parts.parent / "runs").glob("*.csv")} == {"table4-parts-bolt.csv",
                                                                      "table4-parts-nut.csv"}
    assert printed.index("average of bolt, nut") > printed.index("table4-parts-nut.csv")
    metrics = parts.parent / "runs/parts/nut-seed-0/metrics-final_masklast.json"
    assert json.loads(metrics.read_text())["infer_steps"] == 5           # so that M_last is M_1
