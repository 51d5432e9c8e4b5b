from pathlib import Path

from PIL import Image

from medssl_cli.report.plots import draw_progress


def test_progress_is_a_picture_even_with_gaps(tmp_path: Path) -> None:
    rows = [{"iteration": i, "total_loss": 9 - i / 10, "lr": i * 1e-5, "teacher_entropy": None} for i in range(20)]
    draw_progress(rows, tmp_path / "progress.png", "run")
    with Image.open(tmp_path / "progress.png") as image:
        assert image.size == (1200, 700)
        assert len(image.convert("RGB").resize((120, 70)).getcolors(9000)) > 5
