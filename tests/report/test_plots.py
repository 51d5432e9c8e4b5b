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


def test_scores_and_health_get_panels_of_their_own(tmp_path: Path) -> None:
    rows = [{"iteration": i, "total_loss": 9.0, "dino_agreement": i / 20, "grad_norm_backbone": 1.0} for i in range(20)]
    history = [
        {"iteration": i, "metric": "linear_mcc", "value": i / 40, "linear_mcc": i / 40, "knn_mcc": None if i else 0.1,
         "is_best": i > 0}
        for i in (0, 10, 20)
    ]  # fmt: skip
    draw_progress(rows, tmp_path / "progress.png", "run", evaluations=history)
    with Image.open(tmp_path / "progress.png") as image:
        assert image.size == (1800, 700)
        probes = image.convert("RGB").crop((1200, 0, 1800, 350))
    counts = {colour: n for n, colour in probes.getcolors(1 << 20)}
    orange, grey = (255, 127, 14), (115, 115, 115)
    assert counts[orange] > 100  # the linear probe and the star of the best
    assert counts[grey] > 50  # the level of the start
    draw_progress(rows, tmp_path / "progress.png", "run", evaluations=[{**history[0], "value": None}])
    draw_progress(rows, tmp_path / "progress.png", "run")
    with Image.open(tmp_path / "progress.png") as image:
        assert image.size == (1800, 700)
