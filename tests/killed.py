"""`lmm-sae` with a moment at which it kills itself, as a machine may.

python -m tests.killed step:13 STAGE ...      before step 13 is logged
python -m tests.killed save:10:3 STAGE ...    once 3 files of the checkpoint of
                                              step 10 are there, none in place
python -m tests.killed freeze:13 STAGE ...    not killed at step 13, but stopped
"""

import os
import pathlib
import signal
import sys
import threading

from lmm_sae import cli
from lmm_sae.sae import checkpoint
from lmm_sae.stages import train


def kill(kind: signal.Signals = signal.SIGKILL) -> None:
  """Ends this process on the spot."""
  os.kill(os.getpid(), kind)


def at_step(step: int, kind: signal.Signals = signal.SIGKILL) -> None:
  """Has it killed when the numbers of a step come in."""
  add = train.StepLog.add

  def add_or_die(self, at, numbers):
    if at == step:
      kill(kind)
    add(self, at, numbers)

  train.StepLog.add = add_or_die


def in_save(step: int, files: int) -> None:
  """Has it killed while a checkpoint is written, by a thread that watches."""
  save = checkpoint.Checkpoints.save

  def watch(path: pathlib.Path) -> None:
    while True:
      torn = path.glob(f'{step}.orbax-checkpoint-tmp*/**/*')
      try:
        if sum(found.is_file() for found in torn) >= files:
          kill()
      except FileNotFoundError:
        pass  # renamed under the glob's feet

  def save_and_die(self, state, note, places_S2):
    if note.step == step:
      threading.Thread(target=watch, args=(self.path,), daemon=True).start()
    save(self, state, note, places_S2)
    if note.step == step:
      self.wait()  # a checkpoint in place means that the watch was too slow
      kill(signal.SIGTERM)

  checkpoint.Checkpoints.save = save_and_die


def main(when: str, argv: list[str]) -> int:
  """Runs the command; see the module."""
  kind, *numbers = when.split(':')
  if kind == 'step':
    at_step(int(numbers[0]))
  elif kind == 'freeze':
    at_step(int(numbers[0]), signal.SIGSTOP)
  else:
    in_save(*map(int, numbers))
  return cli.main(argv)


if __name__ == '__main__':
  sys.exit(main(sys.argv[1], sys.argv[2:]))
