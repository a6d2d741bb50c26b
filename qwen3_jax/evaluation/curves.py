"""The report's loss curves and the smaller charts of training, by stage."""
from qwen3_jax.evaluation.chart import Band, Series, write_figure


def write_curves(stages, title, of_policy):
  """The losses, and a grid of the smaller charts.

  `title(stage)` names a stage, `of_policy(stage)` says that its loss is no likelihood of a text.
  """
  if not any(stage.get('metrics') for stage in stages):
    return '<p>No metrics were recorded.</p>'
  texts = [stage for stage in stages if not of_policy(stage)]
  places, bands, x_label = place(texts, title)
  losses = [*_curve(texts, places, 'loss', 'train, each step', 0, 'faint'),
            *_curve(texts, places, 'loss', 'train, smoothed', 0, smooth=25),
            *_curve(texts, places, 'heldout_loss', 'held-out', 1, 'dots')]
  figures = [write_figure('Loss', 'Mean negative log-likelihood of the next token, in nats: of '
                          'text, then of conversations.', losses, x_label, 'loss', wide=True,
                          bands=bands)]
  places, bands, x_label = place(stages, title)

  def curve(key, name, color=0, style='line', smooth=None):
    return _curve(stages, places, key, name, color, style, smooth)
  small = [
    ('Learning rate', 'As scheduled, by stage; logarithmic.', curve('lr', 'learning rate'),
     {'log': True}),
    ('Gradient norm', 'Before clipping; logarithmic.',
     curve('grad_norm', 'each step', 0, 'faint') + curve('grad_norm', 'smoothed', smooth=25),
     {'log': True}),
    ('Speed', 'Target tokens per second.',
     curve('tokens_per_s', 'each step', 2, 'faint')
     + curve('tokens_per_s', 'smoothed', 2, smooth=25), {'zero': True}),
    ('Expert balance', 'Balance loss, and the busiest expert against the mean; 1 is even.',
     curve('balance', 'balance loss', 0) + curve('expert_peak', 'busiest expert', 1), {})]
  small = [write_figure(heading, caption, series, x_label, heading.lower(), bands=bands, **options)
           for heading, caption, series, options in small]
  return '\n'.join(['<section>', '<h2>Training curves</h2>', *figures, '<div class="grid">',
                    *filter(None, small), '</div>', '</section>'])


def place(stages, title):
  """x of every line, running on through the stages, with the bands and the name of x.

  x counts tokens if every line says how many, else steps.
  """
  lines = [line for stage in stages for line in stage.get('metrics') or ()]
  by_tokens = bool(lines) and all(line.get('tokens') for line in lines)
  places, bands, start = [], [], 0
  for stage in stages:
    xs, x = [], start
    for line in stage.get('metrics') or ():
      x = x + line['tokens'] if by_tokens else start + line['step']
      xs.append(x)
    places.append(xs)
    bands.append(Band(title(stage), start, x))
    start = x
  return places, bands, 'tokens' if by_tokens else 'steps'


def _curve(stages, places, key, name, color=0, style='line', smooth=None):
  return [Series(name, xs, _smooth(_values(stage, key), smooth), color, style)
          for stage, xs in zip(stages, places)]


def _values(stage, key):
  """A metric's values, one a line; a vector (one a layer) as its mean."""
  values = (line.get(key) for line in stage.get('metrics') or ())
  return [_mean(value) if isinstance(value, list) else value for value in values]


def _mean(values):
  values = [value for value in values if value is not None]
  return sum(values) / len(values) if values else None


def _smooth(values, share):
  """Centred running mean over 1/`share` of the values, a third as wide at both ends."""
  if share is None:
    return values
  half, sums, counts = len(values) // (2 * share), [0.0], [0]
  for value in values:
    sums.append(sums[-1] + (value or 0))
    counts.append(counts[-1] + (value is not None))
  smoothed = []
  for i in range(len(values)):
    reach = max(min(half, i, len(values) - 1 - i), half // 3)
    low, high = max(i - reach, 0), min(i + reach + 1, len(values))
    count = counts[high] - counts[low]
    smoothed.append((sums[high] - sums[low]) / count if count else None)
  return smoothed


def write_probe(stage):
  """Loss by position before and after a stage with longer rows; '' where there is no probe."""
  probe = stage.get('probe')
  if not probe:
    return ''
  series = [Series(name, probe['positions'], losses, i, 'line' if i else 'dashed')
            for i, (name, losses) in enumerate(probe['losses'].items())]
  old, last = probe.get('old_length'), max(probe['positions'])
  bands = [Band('trained length before', 0, old), Band('beyond it', old, last)] if old else []
  figure = write_figure(
    'Loss by position', 'Mean loss of held-out text against the position in it: lower to the right '
    'means that the model uses what lies far back.', series, 'position', 'loss', wide=True,
    bands=bands)
  return f'<section><h2>Long-context probe</h2>{figure}</section>' if figure else ''
