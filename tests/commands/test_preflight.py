"""preflight tells facts, and finds what is wrong."""
from qwen3_jax.__main__ import main


def test_all_well(tmp_path, capsys):
  assert main(['preflight', f'--workdir={tmp_path}/new', '--chips=4']) == 0
  shown = capsys.readouterr().out
  assert 'host 0 of 1: 4 of 4 devices' in shown and 'can be written' in shown
  assert not list((tmp_path / 'new').iterdir())


def test_faults_are_named(tmp_path, capsys):
  (tmp_path / 'file').write_text('')
  assert main(['preflight', f'--workdir={tmp_path}/file/x', '--chips=8']) == 78
  said = capsys.readouterr().err
  assert '4 devices, 8 were wanted' in said and 'cannot write to' in said
