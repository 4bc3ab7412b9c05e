"""Which test images are shown in the picture of a run."""
from support.pictures import MAX_ROWS, pick_rows


def test_the_picture_of_a_run_has_a_bounded_number_of_rows():
    """The test set has a folder for each part: not all of them are shown, but a good image is."""
    kinds = [f"SN{k // 2:05}" for k in range(120)] + ["good"] * 10
    shown = pick_rows(kinds)
    assert len(set(shown)) == len(shown) == MAX_ROWS and kinds[shown[-1]] == "good"
    assert len({kinds[k] for k in shown}) == MAX_ROWS
    assert len(pick_rows(kinds[:6] + kinds[-4:])) == 8                      # two of each kind
