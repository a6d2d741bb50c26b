"""The mixed set of thinking-mode fusion: two modes in one model, switched by flags.

Qwen3 Technical Report, section 4.3 and Table 9: thinking samples are the current model's own right
answers, others are curated; `/think` and `/no_think` stand in user or system turns, some thinking
samples carry no flag, and in conversations of several turns the last flag decides. Shares and rates
are unpublished: they are arguments.
"""
import collections
import random

from qwen3_jax.data.mixture import shuffle

FLAGS = {True: '/think', False: '/no_think'}
SILENT = 0.25  # of the turns before any flag; after one, of twice as many it goes on in silence


def fuse(thinking, plain, translation=None, *, size, seed=0, thinking_share=0.5,
         translation_share=0.0, flag_rate=0.5, hard_rate=0.2, system_rate=0.2, turns_rate=0.25,
         most_turns=4, extra_rate=0.2):
  """Iterates over `size` conversation records; the same for the same arguments.

  `thinking`, `plain` and `translation` are indexable sources of conversation records of one turn
  each or more; every record of one is used once before any comes again. Of the samples,
  `thinking_share` think, `translation_share` (of the rest) are translations answered without
  thinking. `flag_rate`: thinking samples that say /think (the others say nothing: thinking is the
  default). `hard_rate`: plain samples without a flag, which `enable_thinking=False` asks for.
  `system_rate`: flags put into the system turn. `turns_rate`: samples joined into conversations of
  2 to `most_turns` turns, in which a turn may keep the last flag's mode in silence. `extra_rate`:
  of the flagged user turns those that say the opposite first.

  A record has `kind`: thinking, plain or turns. Raises ValueError where a source that is wanted is
  empty, or a share is not one.
  """
  rates = dict(thinking_share=thinking_share, translation_share=translation_share,
               flag_rate=flag_rate, hard_rate=hard_rate, system_rate=system_rate,
               turns_rate=turns_rate, extra_rate=extra_rate)
  for name, rate in rates.items():
    if not 0 <= rate <= 1:
      raise ValueError(f'{name} is {rate}: want a share from 0 to 1')
  pools = dict(thinking=_Pool('thinking', thinking, seed), plain=_Pool('plain', plain, seed + 1),
               translation=_Pool('translation', translation, seed + 2))
  for i in range(size):
    rng = random.Random(f'fusion {seed} {i}')
    draw = _Draw(rng, pools, rates)
    if rng.random() < turns_rate:
      yield draw.join(rng.randint(2, max(2, most_turns)))
    else:
      yield draw.single()


class _Pool:
  """Records of a source in a seeded order, each once before any comes again."""

  def __init__(self, name, source, seed):
    self.name, self.source, self.seed, self.count = name, source, seed, 0

  def take(self):
    if not self.source:
      raise ValueError(f'no {self.name} records, but the shares ask for some; give a source of '
                       'them or set its share to 0')
    epoch, place = divmod(self.count, len(self.source))
    self.count += 1
    return self.source[shuffle(place, len(self.source), self.seed, epoch)]


class _Draw:
  """One sample in the making."""

  def __init__(self, rng, pools, rates):
    self.rng, self.pools, self.rates = rng, pools, rates

  def chance(self, name):
    return self.rng.random() < self.rates[name]

  def mode(self):
    return self.chance('thinking_share')

  def record(self, think):
    if think:
      return self.pools['thinking'].take()
    return self.pools['translation' if self.chance('translation_share') else 'plain'].take()

  def single(self, record=None, think=None):
    think = self.mode() if record is None else think
    record = dict(record or self.record(think))
    messages = record['messages'] = [dict(m) for m in record['messages']]
    flagged = self.chance('flag_rate') if think else not self.chance('hard_rate')
    if flagged:
      self.flag(messages, think)
    return record | dict(kind='thinking' if think else 'plain', enable_thinking=think or flagged)

  def join(self, turns):
    """Records as turns of one conversation, each in the mode of the last flag before it.

    A record with tools stays alone: its tools are no other turn's.
    """
    mode, messages = None, []
    if self.chance('system_rate'):
      mode = self.mode()
      messages.append(dict(role='system', content=FLAGS[mode]))
    for _ in range(turns):
      silent = self.rng.random() < (SILENT if mode is None else 2 * SILENT)
      think = (mode is not False) if silent else self.mode()
      record = self.record(think)
      if record.get('tools'):
        return self.single(record, think)
      turn = [dict(m) for m in record['messages'] if m['role'] != 'system']
      if not silent:
        mode = think
        place = next(i for i, m in enumerate(turn) if m['role'] == 'user')
        turn[place] = self.flagged(turn[place], think)
      messages += turn
    return dict(messages=messages, kind='turns', enable_thinking=True)

  def flag(self, messages, think):
    """Puts the flag into the system turn (made, if there is none) or into the last user turn."""
    if self.chance('system_rate'):
      if messages[0]['role'] != 'system':
        messages.insert(0, dict(role='system', content=FLAGS[think]))
      else:
        messages[0] = self.flagged(messages[0], think)
      return
    place = max(i for i, m in enumerate(messages) if m['role'] == 'user')
    messages[place] = self.flagged(messages[place], think)

  def flagged(self, message, think):
    flags = FLAGS[think]
    if self.chance('extra_rate'):
      flags = f'{FLAGS[not think]} {flags}'
    return message | dict(content=f'{message["content"]} {flags}'.strip())


def fit(sizes, *, thinking_share, translation_share, turns_rate, most_turns=4, **_):
  """The number of samples after which the first of the pools has been used once."""
  records = 1 - turns_rate + turns_rate * (2 + max(2, most_turns)) / 2
  shares = dict(thinking=thinking_share, plain=(1 - thinking_share) * (1 - translation_share),
                translation=(1 - thinking_share) * translation_share)
  return max(1, int(min(sizes.get(name, 0) / (share * records)
                        for name, share in shares.items() if share)))


class Counts(collections.Counter):
  """What a fused set holds, for a table: modes, flags, turns."""

  def add(self, record):
    self[record['kind']] += 1
    users = [m['content'] for m in record['messages'] if m['role'] == 'user']
    self['user turns'] += len(users)
    for flag in FLAGS.values():
      self[f'user turns with {flag}'] += sum(flag in text.split() for text in users)
    self['system turns with a flag'] += any(
      m['role'] == 'system' and bool(set(FLAGS.values()) & set(m['content'].split()))
      for m in record['messages'])
