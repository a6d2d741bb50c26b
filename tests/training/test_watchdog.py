"""The watchdog ends what hangs, and nothing else."""
import threading
import time

from qwen3_jax.training.watchdog import EXIT_CODE, Watchdog


def test_a_hang_ends_the_process_with_its_stacks(capfd):
  ended, code = threading.Event(), []
  with Watchdog(least=0.2, end=lambda c: (code.append(c), ended.set())) as watch:
    watch.beat()
    watch.beat()
    assert ended.wait(10)
  assert code == [EXIT_CODE]
  shown = capfd.readouterr().err
  assert 'this process hangs' in shown and 'test_a_hang_ends_the_process' in shown


def test_the_first_turn_and_pauses_have_no_limit():
  code = []
  with Watchdog(least=0.1, end=code.append) as watch:
    time.sleep(0.4)  # compiles
    watch.beat()
    watch.beat()
    with watch.paused():
      time.sleep(1.2)  # longer than twice the first turn
    watch.beat()
  assert not code


def test_the_limit_grows_with_the_turns():
  watch = Watchdog(least=0.5)
  with watch:
    watch.beat()
    time.sleep(0.05)
    watch.beat()
    assert watch.limit >= 20 * 0.05
