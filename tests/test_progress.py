"""Progress shows what is known and never waits for a device."""

import io

import jax.numpy as jnp
import pytest

from robust_ssl import progress


class _Clock:
    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now


class _Loss:
    """A loss on a device that nobody may read before it is there."""

    def __init__(self, value):
        self.value, self.ready = value, False

    def is_ready(self):
        return self.ready

    def __float__(self):
        assert self.ready, "the host waited for the device"
        return self.value


@pytest.fixture
def clock(monkeypatch):
    clock = _Clock()
    monkeypatch.setattr(progress, "time", clock)
    yield clock
    progress.set_mode("auto")


def test_without_a_terminal_there_is_one_line_every_five_seconds(clock, capsys):
    progress.set_mode("auto")  # pytest's stderr is no terminal
    with progress.Progress().stage("stage1", total_steps=100, images_per_step=64) as bar:
        for step in range(100):
            clock.now += 0.5
            bar.update(step + 1, loss=1.0 / (step + 1))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 11  # 50 s make ten, and one says it is done
    # Step 59 is over at 30 s: 2 steps a second since the first one, 40 to go.
    assert lines[5] == "stage1: step 60/100, 128 images/s, loss 0.01667, 20 s left"
    assert lines[-1] == "stage1: 100/100 steps in 50 s, loss 0.01"


def test_a_loss_is_read_only_when_it_is_there_and_counts_finished_steps(clock, capsys):
    progress.set_mode("log")
    with progress.Progress().stage("s", total_steps=10) as bar:
        losses = [_Loss(float(step)) for step in range(10)]
        for step in range(5):
            clock.now += 2.0
            bar.update(step + 1, loss=losses[step])
        assert (bar.finished_steps, bar.loss) == (0, None)
        losses[0].ready = losses[1].ready = True
        clock.now += 4.0
        bar.update(6, loss=losses[5])
        assert (bar.finished_steps, bar.loss) == (2, 1.0)
        for loss in losses:
            loss.ready = True
        bar.update(7, loss=losses[6])  # not due: nothing is read
        assert bar.finished_steps == 2
    assert "step 0/10, 6 s so far" in capsys.readouterr().err
    assert (bar.finished_steps, bar.loss) == (7, 6.0)


def test_a_resumed_stage_measures_its_own_speed_only(clock):
    progress.set_mode("log")
    with progress.Progress().stage(
        "s", total_steps=1000, images_per_step=10, start_step=900
    ) as bar:
        for step in range(900, 920):
            clock.now += 1.0
            bar.update(step + 1, loss=0.5)
        assert bar.rate == pytest.approx(1.0)
        # 919 or more are over; the estimate is for what is left, not for all 1000.
        assert bar.seconds_left == pytest.approx(1000 - bar.finished_steps)
        assert bar.seconds_left <= 85


def test_a_terminal_gets_a_bar_and_a_last_line(clock, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    progress.set_mode("auto")
    loss = jnp.float32(2.0).block_until_ready()  # on a busy machine it is late
    with progress.Progress().stage("stage1", total_steps=4, images_per_step=8) as bar:
        for step in range(4):
            clock.now += 1.0
            bar.update(step + 1, loss=loss)
    text = terminal.getvalue()
    assert "stage1" in text and "3/4" in text and "images/s" in text
    assert text.rstrip().endswith("stage1: 4/4 steps in 4 s, loss 2")


def test_quiet_says_nothing_and_an_error_passes_through(clock, capsys):
    progress.set_mode("quiet")
    with pytest.raises(ZeroDivisionError), progress.Progress().stage("s", total_steps=2) as bar:
        clock.now += 100
        bar.update(1, loss=_Loss(1.0))
        raise ZeroDivisionError
    assert capsys.readouterr().err == ""
    with pytest.raises(ValueError, match="mode must be one of"):
        progress.set_mode("loud")


def test_a_line_without_news_is_not_printed_but_for_a_sign_of_life_every_minute(clock, capsys):
    progress.set_mode("log")
    with progress.Progress().stage("evaluate", total_steps=3) as bar:
        bar.update(0)
        for second in range(1, 400):  # a step takes 100 s, and there is an update every second
            clock.now += 1.0
            bar.update(min(2, second // 100))
    assert capsys.readouterr().err.splitlines() == [
        "evaluate: step 0/3, 5 s so far",
        "evaluate: step 0/3, 1:05 in this step",
        "evaluate: step 1/3, 100 s/step, 3:20 left",
        "evaluate: step 1/3, 1:00 in this step",
        "evaluate: step 2/3, 100 s/step, 1:40 left",
        "evaluate: step 2/3, 1:00 in this step",
        "evaluate: step 2/3, 2:00 in this step",
        "evaluate: step 2/3, 3:00 in this step",
        "evaluate: 2/3 steps in 6:39",
    ]


def test_a_line_says_what_is_being_done(clock, capsys):
    progress.set_mode("log")
    with progress.Progress().stage("score", total_steps=12) as bar:
        for step in range(12):
            for model in ("usual", "gen_af"):
                for _ in range(3):
                    clock.now += 2.0
                    bar.update(step, doing=f"{model} under AutoAttack")
            bar.update(step + 1)
    lines = capsys.readouterr().err.splitlines()
    assert "score: 4 of 12, gen_af under AutoAttack, 1:44 left" in lines
    assert len(lines) == len(set(lines))
    assert lines[-1] == "score: 12/12 steps in 2:24"


def test_what_is_over_at_once_is_counted_though_nobody_looked(clock, capsys):
    progress.set_mode("log")
    with progress.Progress().stage("score", total_steps=3) as bar:
        for step in range(3):  # all within one refresh
            bar.update(doing=f"model {step}")
            bar.update(bar.sent + 1)
        bar.update(doing="examining")
    assert capsys.readouterr().err.splitlines()[-1].startswith("score: 3/3 steps")


def test_a_slow_rate_is_in_seconds_a_step(clock, capsys):
    progress.set_mode("log")
    for seconds, pace in ((40.0, "40 s/step"), (8.0, "0.125 steps/s")):
        with progress.Progress().stage("sweep", total_steps=5) as bar:
            for step in range(4):
                clock.now += seconds
                bar.update(step + 1)
            assert bar.describe().startswith(pace)
    assert "sweep: step 3/5, 40 s/step, 1:20 left" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (59.4, "59 s"), (185, "3:05"), (7385, "2:03:05")]
)
def test_durations(seconds, text):
    assert progress.duration(seconds) == text
