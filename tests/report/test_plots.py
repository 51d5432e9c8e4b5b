from pathlib import Path

from PIL import Image

from medssl_cli.report.plots import draw_progress


def test_progress_is_a_picture_even_with_gaps(tmp_path: Path) -> None:
    rows = [{"iteration": i, "total_loss": 9 - i / 10, "lr": i * 1e-5, "teacher_entropy": None} for i in range(20)]
    draw_progress(rows, tmp_path / "progress.png", "run")
    with Image.open(tmp_path / "progress.png") as image:
        assert image.size == (1200, 700)
        assert len(image.convert("RGB").resize((120, 70)).getcolors(9000)) > 5


def test_one_logged_step_and_none_are_drawn_too(tmp_path: Path) -> None:
    def colours(rows: list[dict[str, float]]) -> set[tuple[int, int, int]]:
        draw_progress(rows, tmp_path / "progress.png", "")
        with Image.open(tmp_path / "progress.png") as image:
            return {colour for _, colour in image.convert("RGB").getcolors(1 << 20)}

    blue = (31, 119, 180)  # the first colour of the cycle
    assert blue in colours([{"iteration": 1, "total_loss": 3.0}])
    assert blue not in colours([])
