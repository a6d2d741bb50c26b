"""The page is well-formed, says what the run did, and lets no model text act."""

import argparse
import html.parser
import json
import math
import re

import pytest

from qwen3_jax.commands import report as command
from qwen3_jax.evaluation import chart
from qwen3_jax.evaluation.pictures import write_pictures
from qwen3_jax.evaluation.report import write_report
from qwen3_jax.evaluation.style import COLORS, LIGHT
from qwen3_jax.evaluation.workdir import list_versions, read_stages

HOSTILE = ('</pre><script>alert(1)</script><img src=x onerror=alert(2)> & "q" '
           '\x00\x1b[31m\u202e\ud800')
VOID = {'meta', 'br', 'img', 'link', 'input', 'hr'}


class Page(html.parser.HTMLParser):
  """Checks that tags nest, and collects them and the text."""

  def __init__(self, text):
    super().__init__()
    self.open, self.tags, self.words = [], [], []
    self.feed(text)
    self.close()
    assert not self.open, f'not closed: {self.open}'

  def handle_starttag(self, tag, attributes):
    self.tags.append((tag, dict(attributes)))
    if tag not in VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attributes):
    self.tags.append((tag, dict(attributes)))

  def handle_endtag(self, tag):
    assert self.open and self.open.pop() == tag, f'</{tag}> closes another tag'

  def handle_data(self, data):
    if 'style' not in self.open:
      self.words.append(data)


def make_lines(stage, steps, loss, experts=False):
  lines = []
  for step in range(1, steps + 1):
    line = {'step': step, 'stage': stage, 'loss': loss + 2 * math.exp(-step / 20), 'lr': 1e-3,
            'grad_norm': 0.5 + step % 3, 'tokens': 4000, 'seconds': 0.5}
    if step > 1:
      line |= {'tokens_per_s': 8000.0, 'mfu': 0.25}
    if step % 10 == 0:
      line['heldout_loss'] = loss + 0.125
    if experts:
      line |= {'balance': [1.1, 1.3], 'expert_peak': 2.0}
    lines.append(line)
  return lines


def make_stages(experts=False):
  probe = {'positions': list(range(0, 512, 32)), 'old_length': 128, 'losses': {
    'before S3': [4 - i / 10 for i in range(16)], 'after S3': [3 - i / 10 for i in range(16)]}}
  return [
    {'name': 's1', 'metrics': make_lines('s1', 80, 3, experts),
     'config': {'data': {'length': 128}}, 'samples': [
       {'prompt': HOSTILE, 'completion': f'<think>ponder {HOSTILE}</think>answer {HOSTILE}'}]},
    {'name': 's3', 'metrics': make_lines('s3', 40, 2, experts), 'probe': probe,
     'config': {'data': {'length': 512}}},
    {'name': 'grow <b>', 'metrics': make_lines('x', 1, 2)}]


def write(tmp_path, stages, facts=None, title='A run'):
  write_report(tmp_path / 'report.html', title, stages, facts or {})
  text = (tmp_path / 'report.html').read_text(encoding='utf-8')
  return text, Page(text)


def test_page_holds_all_stages_and_figures(tmp_path):
  facts = {'Parameters': '1,234', 'versions': {'jax': '0.10.2'}}
  text, page = write(tmp_path, make_stages(experts=True), facts)
  words = ' '.join(page.words)
  for expected in ('A run', 'S1 general', 'S3 long context', 'grow <b>', '1,234', '484k', '0.10.2',
                   'Learning rate', 'Gradient norm', 'Speed', 'Expert balance', 'Loss by position',
                   'before S3', 'after S3', '3.125', '2.125', '25.0%', '8,000', '0:40', '1:00',
                   '512', '121'):
    assert expected in words, expected
  titles = [attributes.get('aria-label') for tag, attributes in page.tags if tag == 'svg']
  assert len([title for title in titles if title]) == 6
  assert 'held-out: 3.125' in words  # a tooltip
  assert 'Expert balance' not in write(tmp_path, make_stages())[0]


def test_page_loads_nothing_and_runs_nothing(tmp_path):
  text, page = write(tmp_path, make_stages(), title=HOSTILE)
  assert not re.search(r'https?:|url\(|@import|//[a-z]', text)
  for tag, attributes in page.tags:
    assert tag not in {'script', 'link', 'img', 'iframe', 'object', 'use', 'image'}
    assert not any(name.startswith('on') or name in {'src', 'href', 'xlink:href'}
                   for name in attributes)
  assert "default-src 'none'" in text
  assert 'prefers-color-scheme: dark' in text and '@media print' in text


def test_model_text_is_escaped_and_thinking_folded(tmp_path):
  text, page = write(tmp_path, make_stages())
  assert '<script' not in text and '<img' not in text and 'Transcripts' in page.words
  assert text.count('&lt;script&gt;alert(1)&lt;/script&gt;') == 3
  assert re.search('<details class="thinking"><summary>thinking, [0-9]+ words</summary>'
                   '<pre>ponder &lt;/pre&gt;', text)
  assert not re.search('[\x00-\x08\x1b\u202a-\u202e]', text)


def test_unfinished_thinking_is_folded(tmp_path):
  sample = {'prompt': 'p', 'completion': '<think>never ends'}
  text, _ = write(tmp_path, [{'name': 's2', 'samples': [sample]}])
  assert '<summary>thinking, 2 words</summary><pre>never ends</pre>' in text


@pytest.mark.parametrize('stages', [
  [], [{'name': 's1'}], [{'name': 's1', 'metrics': []}],
  [{'name': 's1', 'metrics': [{'step': 1, 'loss': None}]}],
  [{'name': 's1', 'metrics': [{'step': 1, 'loss': 3.0}]}],
  [{'name': 's1', 'metrics': [{'step': s, 'loss': 3.0, 'grad_norm': 0.0} for s in (1, 2)]}],
  [{'name': 's1', 'metrics': make_lines('s1', 3, 2)}, {'name': 's2', 'metrics': []}],
])
def test_missing_parts_are_left_out(tmp_path, stages):
  text, page = write(tmp_path, stages)
  assert 'A run' in page.words
  assert not re.search(r'\bnan\b|\binf\b|None', text)


def test_a_long_run_makes_a_small_page(tmp_path):
  lines = [{'step': s, 'loss': 2 + s % 7, 'grad_norm': 1.0 + s % 5} for s in range(1, 20001)]
  lines[12345]['loss'] = 99
  text, _ = write(tmp_path, [{'name': 's1', 'metrics': lines}])
  assert len(text) < 200_000
  faint = re.search(r'class="c0 faint" d="M([^"]*)"/>\n<path', text)[1]
  heights = [float(point.split()[1]) for point in faint.split('L')]
  assert min(heights) < min(sorted(heights)[1:]) - 100  # the spike is still to be seen


def test_command_reads_a_recipe(tmp_path, capsys):
  for stage in make_stages()[:2]:
    folder = tmp_path / stage['name']
    folder.mkdir()
    lines = ''.join(json.dumps(line) + '\n' for line in stage['metrics'])
    (folder / 'metrics.jsonl').write_text(lines + '{"step": 9')
    for part in ('config', 'samples', 'probe'):
      if part in stage:
        (folder / f'{part}.json').write_text(json.dumps(stage[part]))
  (tmp_path / 'tokenizer').mkdir()
  (tmp_path / 'facts.json').write_text('{"Size": "tiny"}')
  parser = argparse.ArgumentParser()
  command.add_arguments(parser)
  assert not command.main(parser.parse_args([f'--workdir={tmp_path}']))
  assert capsys.readouterr().out.endswith(f'report: {tmp_path}/report.html\n')
  assert (tmp_path / 'report_figures/loss.svg').exists()
  words = ' '.join(Page((tmp_path / 'report.html').read_text()).words)
  for expected in ('tiny', 'S1 general', 'S3 long context', 'python', 'Long-context probe'):
    assert expected in words
  assert [stage['name'] for stage in read_stages(tmp_path)] == ['s1', 's3']
  assert [stage['name'] for stage in read_stages(tmp_path / 's1')] == ['s1']


def test_bad_workdirs_are_named(tmp_path):
  with pytest.raises(FileNotFoundError, match='no folder .*absent'):
    read_stages(tmp_path / 'absent')
  with pytest.raises(FileNotFoundError, match='no metrics.jsonl in'):
    read_stages(tmp_path)
  (tmp_path / 'metrics.jsonl').write_text('')
  (tmp_path / 'probe.json').write_text('{')
  with pytest.raises(ValueError, match='probe.json is not JSON'):
    read_stages(tmp_path)


GRADED = dict(rate=0.5, low=0.4, high=0.6, count=64)
MODES = dict(
  thinking=GRADED | dict(tokens=40.4, kinds=dict(coin=GRADED)), plain=GRADED | dict(
    rate=0.2, low=0.1, high=0.3, tokens=9.0, kinds=dict(coin=GRADED | dict(rate=0.25))),
  following=GRADED | dict(rate=0.75, parts={'/think': GRADED, '/no_think': GRADED | dict(rate=1.0),
                                            'system': GRADED}),
  budgets=[dict(GRADED, budget=budget, tokens=1, forced=0) for budget in (0, 8, 16)])


def test_stage_table_has_both_modes_and_changes(tmp_path):
  better = json.loads(json.dumps(MODES))
  better['thinking'] |= dict(rate=0.8, low=0.7, high=0.9)
  better['plain'] |= dict(rate=0.15, low=0.08, high=0.25)
  text, page = write(tmp_path, [{'name': 'fusion', 'modes': MODES},
                                {'name': 'general_rl', 'modes': better}])
  rows = {match[1]: match[2] for match in re.finditer(
    r'<tr[^>]*><th scope="row">([^<]*)</th>(.*?)</tr>', text)}
  assert rows['Right answers'] == (
    '<td class="first">50.0<small>40–60</small></td><td>20.0<small>10–30</small></td>'
    '<td class="first">80.0<i class="better">+30.0</i><small>70–90</small></td>'
    '<td>15.0<i>-5.0</i><small>8–25</small></td>')
  assert rows['Last flag obeyed'].count('colspan="2">75.0') == 2
  assert '50.0' in rows['/think, /no_think'] and '100.0' in rows['/think, /no_think']
  assert rows['Tokens of an answer'].startswith('<td class="first">40</td><td>9</td>')
  assert 'Accuracy against thinking budget' in page.words and text.count('class="area') == 2


def test_distillation_is_compared_at_its_cost(tmp_path):
  rows = [dict(name='off-policy', thinking=GRADED, plain=GRADED, flops=0, seconds=0, tokens=0,
               **{'pass': {'1': 0.5, '8': 0.75}}),
          dict(name='off-policy + on-policy', thinking=GRADED | dict(rate=0.7), plain=GRADED,
               flops=3.21e12, seconds=65, tokens=41000, **{'pass': {'1': 0.7, '8': GRADED}})]
  comparison = dict(student=dict(parameters='460,000'), prompts='sums', rows=rows,
                    curves={'RL': [[0, 0.5, 0.4, 0.6], [1e12, 0.55, 0.45, 0.65]]})
  lines = [dict(step=step, loss=1 / step, kl=1 / step, heldout_reward=0.5, prompts=2,
                answer_tokens=30.0) for step in (1, 2, 3)]
  stage = {'name': 'distill_on', 'metrics': lines, 'config': dict(
    method='distill', distillation=dict(kind='reverse_kl'))}
  write_report(tmp_path / 'report.html', 'A run', [stage], {}, comparison)
  text = (tmp_path / 'report.html').read_text()
  table = re.search('<h2>Distillation</h2>.*?</table>', text, re.DOTALL)[0]
  assert '<td>70.0 (40–60)</td>' in table and '<td>75.0</td>' in table
  assert '<td>3.2e+12</td><td>41k</td><td>1:05</td>' in table and 'pass@8' in table
  words = Page(text).words
  for expected in ('Held-out accuracy against cost', 'On-policy: divergence',
                   'On-policy: held-out', 'On-policy: length'):
    assert expected in words, expected
  assert '(reverse kl)' in text and 'Reinforcement learning' not in words


def test_expert_loads_are_a_heat_map(tmp_path):
  text, page = write(tmp_path, [{'name': 's1', 'arrays': {
    'step': 6, 'expert_load_LE': [[1.0, 1.0], [0.0, 8.0]]}}])
  titles = [word for word in page.words if word.startswith('layer ')]
  assert titles == ['layer 0, expert 0: 1.00 times the mean', 'layer 0, expert 1: 1.00 times the '
                    'mean', 'layer 1, expert 0: 0.00 times the mean',
                    'layer 1, expert 1: 2.00 times the mean']
  cells = re.findall(r'<rect class="(c\d)" fill-opacity="([\d.]+)" x="(?!1")', text)
  assert cells == [('c0', '0.02'), ('c0', '0.02'), ('c0', '1.00'), ('c1', '0.33')]


def test_transcripts_of_a_prompt_stand_side_by_side(tmp_path):
  def samples(answer):
    return [{'prompt': 'one?', 'completion': f'<think>\n\n</think>\n\n{answer}'}]
  text, _ = write(tmp_path, [{'name': 'fusion', 'samples': samples('first')},
                             {'name': 'general_rl', 'samples': samples('second')}])
  article, = re.findall('<article>.*?</article>', text, re.DOTALL)
  assert re.findall('<h4>([^<]*)</h4><p class="thinking">no thinking</p><pre>([^<]*)</pre>',
                    article) == [('Fusion', 'first'), ('General RL', 'second')]


def test_pictures_hold_what_the_page_shows(tmp_path):
  resvg = pytest.importorskip('resvg_py')
  write(tmp_path, [*make_stages(), {'name': 's2', 'modes': MODES, 'arrays': {
    'step': 6, 'expert_load_LE': [[1.0, 3.0]]}}])
  problem = write_pictures(tmp_path / 'report.html', tmp_path / 'figures')
  names = sorted(path.stem for path in (tmp_path / 'figures').glob('*.svg'))
  assert names == ['accuracy-against-thinking-budget', 'gradient-norm', 'learning-rate', 'loss',
                   'loss-by-position', 's2-reasoning-load-of-the-experts', 'speed']
  svg = (tmp_path / 'figures/loss.svg').read_text()
  assert 'var(' not in svg and LIGHT['c0'] in svg and 'train, smoothed' in svg
  blank = re.sub('<path[^>]*/>', '', svg)
  assert bytes(resvg.svg_to_bytes(svg_string=blank)) != bytes(resvg.svg_to_bytes(svg_string=svg))
  if problem is None:  # there are fonts
    assert sorted(path.stem for path in (tmp_path / 'figures').glob('*.png')) == names
    assert (tmp_path / 'figures/loss.png').read_bytes().startswith(b'\x89PNG')


def test_origins_costs_and_order_of_a_recipe(tmp_path):
  from qwen3_jax.commands.config import load_config, to_json
  for name in ('zeta', 's1'):
    (tmp_path / name).mkdir()
    config = load_config('configs/s1.py:tiny', ['--config.init=somewhere/s3'])
    (tmp_path / name / 'config.json').write_text(to_json(config))
    (tmp_path / name / 'metrics.jsonl').write_text('{"step": 1, "loss": 2.0}\n')
    (tmp_path / name / 'times.json').write_text('{"train": 61, "measure": 4}')
  (tmp_path / 'recipe.json').write_text('["zeta", "s1"]')
  (tmp_path / 'plan.json').write_text('{"zeta": {"init": null}, "s1": {"init": "zeta"}}')
  stages = read_stages(tmp_path)
  assert [stage['name'] for stage in stages] == ['zeta', 's1']
  assert [stage['origin'] for stage in stages] == ['S3 long context', 'zeta']
  assert [stage['cost'].trained for stage in stages] == [4 * 256] * 2
  text, page = write(tmp_path, stages)
  assert page.words.count('1:05') == 2 and '2:10' in page.words
  assert {'machine', 'cpu', 'python', 'jax'} <= set(list_versions())


def test_lines_beyond_the_palette_differ_by_dashes():
  series = [chart.Series(f's{i}', [0, 1], [i, i], i) for i in range(12)]
  looks = re.findall('<path class="(c[^"]*)"', chart.draw(series, 'x', 'y'))
  assert len(set(looks)) == 12 and COLORS == 8 and looks[0] == 'c0 line'
  assert looks[5] == 'c5 line d1' and looks[9] == 'c1 line d2'


def test_ticks_are_round_and_numbers_short():
  assert chart.find_ticks(0, 10, 5) == [0, 2, 4, 6, 8, 10]
  assert chart.find_ticks(1.93, 8.6, 5) == [2, 4, 6, 8]
  assert chart.find_ticks(0, 0.00105, 3) == [0, 0.0005, 0.001]
  assert chart.find_ticks(3, 3, 5) == [3]
  numbers = {0: '0', 950: '950', 9999: '9,999', 12500: '12.5k', 3.2e6: '3.2M', 36e12: '36T',
             0.0213: '0.0213', 3e-5: '3e-05', -20000: '-20k', 1e20: '1.00e+20'}
  assert {x: chart.format_number(x) for x in numbers} == numbers


def test_points_lie_where_the_axes_say():
  series = [chart.Series('s', [0, 50, 100], [0, 5, 10], style='line')]
  svg = chart.draw(series, 'x', 'y', width=266, height=280, zero=True)
  path = re.search(r'<path class="c0 line" d="M([^"]*)"', svg)[1]
  points = [tuple(map(float, point.split())) for point in path.split('L')]
  ticks = {match[2]: float(match[1]) for match in
           re.finditer(r'y="([\d.]+)" dy="0.32em" text-anchor="end">([^<]+)<', svg)}
  assert [x for x, _ in points] == pytest.approx([54, 154, 254])
  assert points[0][1] == ticks['0'] and points[2][1] == ticks['10']
