from tasks.display import Display
from tasks.pipeline_run import forced_stages


def lines(capsys) -> str:
    return capsys.readouterr().err


def test_plain_lines_without_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr("tasks.display._LINE_SECONDS", 0.0)
    display = Display()
    with display.stage("train-ldm", "max_steps: 4 -> 5"):
        display.update("train-ldm", 0, 1000)
        display.update("train-ldm", 500, 1000, note="loss 0.500")
    display.skipped("generate")
    display.close()
    text = lines(capsys)
    assert "train-ldm: started (max_steps: 4 -> 5)" in text
    assert "500/1,000 images" in text
    assert "images/s" in text
    assert "eta" in text
    assert "loss 0.500" in text
    assert "train-ldm: finished in" in text
    assert "generate: skipped" in text


def test_quiet(capsys):
    display = Display(quiet=True)
    with display.stage("train-ldm"):
        display.update("train-ldm", 1, 2)
    display.close()
    assert lines(capsys) == ""


def test_forced_stages():
    assert forced_stages([]) == set()
    assert forced_stages(["generate"]) == {"generate", "evaluate"}
    assert forced_stages(["train_ldm", "evaluate"]) == {"train-ldm", "generate", "evaluate"}
