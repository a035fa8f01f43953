"""Signals that stop a run: it saves, says so, and goes on later as if nothing had been."""

import fcntl
import os
import pty
import signal
import sys
import termios
import time

import toy
from forked import run

from common.runtime.command import StopRequest
from common.train.loop import Trainer


def test_what_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.01)  # Python runs the handler between two instructions
            assert stop.signum is None
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_what_a_terminal_or_scheduler_sends_twice_waits_for_the_save(capsys):
    for signums in ([signal.SIGHUP] * 2, [signal.SIGUSR1, signal.SIGTERM]):
        with StopRequest() as stop:
            for signum in signums:
                os.kill(os.getpid(), signum)
                time.sleep(0.01)
            assert stop.signum == signums[0]
        assert capsys.readouterr().err.count("saving") == 1


def test_a_run_whose_terminal_is_gone_saves(tmp_path, monkeypatch):
    def main(argv):
        os.setsid()
        terminal, own = pty.openpty()
        fcntl.ioctl(own, termios.TIOCSCTTY, 0)
        step = Trainer.train_step

        def hung_up(self, batches):
            step(self, batches)
            if self.state.run.step == 5:
                os.close(terminal)
                self.warn("nobody reads this")

        monkeypatch.setattr(Trainer, "train_step", hung_up)
        monkeypatch.setattr(sys, "stderr", os.fdopen(own, "w", closefd=False))
        try:
            toy.main(argv)
        finally:
            monkeypatch.undo()

    stopped = run(main, "--out", str(tmp_path), "--batch_size", "120", "--name", "run")
    assert stopped.statuses == [128 + signal.SIGHUP], stopped.err
    assert "stopped after step 5; go on with:" in stopped.err
