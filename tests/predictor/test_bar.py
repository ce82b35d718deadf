"""The bar of a fit has room for its numbers in a narrow terminal."""

from tqdm.auto import tqdm

from predictor.bar import FORMAT


def test_a_bar_is_left_at_80_columns() -> None:
    numbers = "train/loss=0.123, val/mass=0.983"
    line = tqdm.format_meter(
        1100, 2500, 100.0, ncols=80, prefix="epoch 13/20", postfix=numbers, bar_format=FORMAT, ascii=True
    )
    assert len(line) <= 80 and numbers in line and "44%" in line
    assert len(line.split("|")[1]) >= 6
