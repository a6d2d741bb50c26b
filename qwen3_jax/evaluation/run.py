"""Runs benchmarks: every answer is kept with its score, and a killed run goes on where it was.

A model's answers to one benchmark in one mode under one sampling and budget are a part of the
store (`store.Part`). What a sample draws depends on its record, its number and the seed alone, so
neither order nor interruptions change it (beyond the rounding of another batch).
"""
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from qwen3_jax.evaluation import benchmarks as catalogue
from qwen3_jax.evaluation import likelihood, store, summary
from qwen3_jax.evaluation.board import Tally
from qwen3_jax.evaluation.workdir import list_versions
from qwen3_jax.generation import engine, thinking
from qwen3_jax.generation.sampling import Sampling
from qwen3_jax.rewards import answers, final
from qwen3_jax.rewards.response import Response
from qwen3_jax.stages import load
from qwen3_jax.text.template import render

MODES = {'thinking': True, 'plain': False}
CHUNK = 16  # requests that the engine is given at once, times its rows
TEXTS = 128  # records whose likelihoods are measured at once
TAIL = 2000  # characters at the end of an answer in which the final one is looked for


@dataclasses.dataclass(frozen=True)
class Ask:
  """One part: how a benchmark is put to a model. `mode` is one of MODES, or 'likelihood'."""
  benchmark: catalogue.Benchmark
  mode: str
  budget: int | None = None
  sampling: Sampling | None = None
  samples: int = 1

  @property
  def name(self):
    return f'{self.benchmark.name} {self.mode}' + (
      '' if self.budget is None else f' {self.budget}')

  def open(self, root, model):
    """The `store.Part` of the model with this fingerprint."""
    about = dict(model=model, benchmark=self.benchmark.name, scoring=self.benchmark.scoring,
                 mode=self.mode)
    if self.sampling:
      stop = None if self.budget is None else thinking.STOP
      about |= dict(budget=self.budget, stop=stop, sampling=dataclasses.asdict(self.sampling))
    return store.Part(Path(root) / 'generations', self.name, about)

  @functools.cached_property
  def jobs(self):
    """{key: (record, sample)}: all that is asked, samples of a record one after another."""
    found = {}
    for record in self.benchmark.records:
      if self.mode in MODES:
        record = record | dict(enable_thinking=MODES[self.mode])
      mark = store.digest(record)
      found |= {store.digest(mark, sample): (record, sample) for sample in range(self.samples)}
    return found


def make_asks(benchmarks, modes=tuple(MODES), samples=None, budgets=(), max_tokens=None, seed=0):
  """The parts that `evaluate` runs: each benchmark in each mode, then with each thinking budget.

  What is None is the benchmark's own. Raises ValueError for a mode that does not exist, or where
  nothing is left to ask.
  """
  for mode in modes:
    if mode not in MODES:
      raise ValueError(f'no mode {mode!r}: there are {", ".join(MODES)}')
  asks = []
  for benchmark in benchmarks:
    if benchmark.scoring != 'generate':
      asks.append(Ask(benchmark, 'likelihood'))
      continue
    for mode in (mode for mode in modes if MODES[mode] in benchmark.modes):
      sampling = dataclasses.replace(benchmark.sampling(MODES[mode]), seed=seed)
      sampling = dataclasses.replace(sampling, max_tokens=max_tokens or sampling.max_tokens)
      for budget in (None, *(budgets if MODES[mode] else ())):
        asks.append(Ask(benchmark, mode, budget, sampling, samples or benchmark.samples))
  if not asks:
    raise ValueError(f'no benchmark of {", ".join(each.name for each in benchmarks)} is asked in '
                     f'the mode {" or ".join(modes)}')
  return asks


def evaluate(model, asks, to, name=None, rows=64, router=None, mesh=None, progress=None):
  """What a model does on `asks` (see `make_asks`), as a dict that JSON can hold.

  `model` is a folder (see `stages.load.find`) or a pair (model, tokenizer), which needs a `name`.
  All that is generated is kept below the folder `to` with its score, and what is there already is
  not generated again; the result is also in `to`/results. `router` scores (by default one that
  `benchmarks.open_router` opens). `rows` answers are written at once; under a `mesh` rows are split
  over its devices.
  `progress(dict)` is told of every step: part, done and total (problems), rate (so far),
  tokens_per_s, seconds_left, ended. Returns {'model', 'fingerprint', 'settings', 'parts'}, a list
  of what `summary.summarise` gives. Raises RuntimeError where records have code and this machine
  no sandbox to run it in.
  """
  own = None if router else catalogue.open_router([ask.benchmark for ask in asks])
  try:
    if not isinstance(model, tuple):
      name = name or (str(model) if '://' in str(model) else os.path.abspath(model))
      model = open_model(model, mesh)
    model, tokenizer = model
    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
      return _run(model, tokenizer, asks, to, name, rows, router or own, progress)
  finally:
    if own:
      own.close()


def _run(model, tokenizer, asks, to, name, rows, router, progress):
  mark, decoder = fingerprint(model, tokenizer), None
  settings = dict(rows=rows, dtype=str(model.embed_VD.dtype), versions=list_versions())
  result = dict(model=name, fingerprint=mark, settings=settings, parts=[])
  for ask in asks:
    with ask.open(to, mark) as part:
      if ask.mode in MODES:
        decoder = decoder or engine.Engine(model, tokenizer, rows).decoder
        draw(decoder, tokenizer, ask, part, router, rows, progress)
      else:
        measure(model, tokenizer, ask, part, progress)
      result['parts'].append(summary.summarise(ask, part))
    summary.keep(result, to)
  return result


def open_model(folder, mesh=None):
  """(model, tokenizer) in the type that this machine computes in."""
  return load.load_model(
    folder, mesh, jnp.float32 if jax.default_backend() == 'cpu' else jnp.bfloat16)


def draw(decoder, tokenizer, ask, part, router, rows=64, progress=None):
  """Generates and scores what the part lacks. Scores are computed while the engine goes on."""
  kept = {key: part.lines[key] for key in ask.jobs if key in part.lines}
  _score(ask, part, router, [key for key, line in kept.items()
                             if 'text' in line and line.get('score') is None])
  runner = engine.Engine(decoder, tokenizer, rows)
  left = [(key, *job) for key, job in ask.jobs.items() if key not in part.lines]
  prompts = {id(record): _encode(tokenizer, record) for _, record, _ in left}
  left = _refuse_long(left, prompts, runner.longest, part)
  tally = Tally(ask, part, progress)
  if left:
    usual = min(ask.sampling.max_tokens, engine.USUAL) + max(
      len(prompts[id(record)]) for _, record, _ in left)
    pages = 1 + min(rows, len(left)) * -(-usual // runner.page)
    runner.count = max(runner.count, engine.round_up(pages))  # parts compile alike
  with concurrent.futures.ThreadPoolExecutor(1) as scorer:
    for first in range(0, len(left), CHUNK * rows):
      chunk = left[first:first + CHUNK * rows]
      _draw_some(runner, ask, part, router, chunk, prompts, scorer, tally)
  tally.show(ended=True)


def measure(model, tokenizer, ask, part, progress=None):
  """Measures the likelihoods that the part lacks."""
  left = [(key, record) for key, (record, _) in ask.jobs.items() if key not in part.lines]
  tally = Tally(ask, part, progress)
  for first in range(0, len(left), TEXTS):
    keys, records = zip(*left[first:first + TEXTS])
    if ask.benchmark.scoring == 'perplexity':
      texts = likelihood.perplexity(model, tokenizer, [record['text'] for record in records])
      found = [each | dict(score=likelihood.rates(**each)['bits_per_byte'], details={},
                           missing=None if each['bytes'] else 'too short to be measured')
               for each in texts['documents']]
    else:
      found = [dict(score=each.value, details=each.details, missing=each.missing, tokens=0)
               for each in likelihood.choose(model, tokenizer, records)]
    lines = [dict(key=key, id=record['id'], sample=0) | each
             for key, record, each in zip(keys, records, found)]
    part.add(lines)
    tally.take(lines)
    tally.show()
  tally.show(ended=True)


def _draw_some(runner, ask, part, router, chunk, prompts, scorer, tally):
  """Generates a chunk of jobs, keeps each that ends, and has it scored in the scorer's thread."""
  ended, scoring = [], None
  requests = [engine.Request(prompts[id(record)], ask.sampling, int(key[:8], 16), ask.budget)
              for key, record, _ in chunk]

  def take(index, output):
    key, record, sample = chunk[index]
    part.add([dict(key=key, id=record['id'], sample=sample, text=output.text,
                   tokens=len(output.tokens), finish=output.finish_reason,
                   forced=int(output.forced.sum()))])
    ended.append(key)

  def begin():
    keys = list(ended)
    ended.clear()
    return scorer.submit(_score, ask, part, router, keys, tally)
  for _ in runner.steps(requests, ended=take):
    if ended and (scoring is None or scoring.done()):
      if scoring:
        scoring.result()
      scoring = begin()
    tally.show()
  for last in (scoring, begin() if ended else None):
    if last:
      last.result()


def _score(ask, part, router, keys, tally=None):
  """Scores kept generations; how many scores are not those kept before."""
  lines = [part.lines[key] for key in keys]
  found = score(ask.benchmark, [ask.jobs[key][0] for key in keys], lines, router)
  changed = [dict(key=key) | new for key, old, new in zip(keys, lines, found)
             if not new.items() <= old.items()]
  part.add(changed)
  if tally:
    tally.take([part.lines[key] for key in keys])
  return len(changed)


def score(benchmark, records, lines, router):
  """What texts are worth, a dict each: `score` (None: `missing` says why), details, answer."""
  responses = [Response.read(line['text'], line['tokens'], line['finish']) for line in lines]
  scores = catalogue.score(benchmark, records, responses, router)
  return [dict(score=each.value, details=each.details, missing=each.missing,
               answer=find_answer(record, response))
          for record, response, each in zip(records, responses, scores)]


def find_answer(record, response):
  """The final answer to vote with, as text; None where there is none, or answers have no vote."""
  rules = {name for name, weight in record['verifiers'].items() if weight > 0}
  if rules != {'math'} or response.finish_reason != 'stop' or not response.content.strip():
    return None
  tail = response.content[-TAIL:]
  return answers.find_boxed(tail) or final.find(tail)


def rescore(benchmarks, to, router):
  """Scores anew what is kept below `to` of these benchmarks, without any model.

  Yields {'model', 'part', 'count', 'changed'}; where scores differ from those kept, the new ones
  are added to the store and to the results. Raises FileNotFoundError where nothing is kept.
  """
  known = {each.name: each for each in benchmarks}
  for path, result in summary.read_results(to):
    for i, entry in enumerate(result['parts']):
      if entry['benchmark'] in known and entry['mode'] in MODES:
        about = store.read_json(Path(to) / 'generations' / entry['folder'] / 'about.json')
        ask = Ask(known[entry['benchmark']], entry['mode'], entry['budget'],
                  Sampling(**about['sampling']), entry['samples'])
        with ask.open(to, result['fingerprint']) as part:
          keys = [key for key in ask.jobs if 'text' in part.lines.get(key, ())]
          changed = _score(ask, part, router, keys)
          result['parts'][i] = summary.summarise(ask, part)
        store.write_json(path, result)
        yield dict(model=result['model'], part=ask.name, count=len(keys), changed=changed)


def _encode(tokenizer, record):
  return tokenizer.encode(render(record['messages'], record.get('tools'),
                                 record['enable_thinking'], add_generation_prompt=True))


def _refuse_long(left, prompts, longest, part):
  """The jobs whose prompts the model can read; the others are kept as missing."""
  sizes = {key: len(prompts[id(record)]) for key, record, _ in left}
  part.add([dict(key=key, id=record['id'], sample=sample, tokens=0, finish='prompt', score=None,
                 missing=f'the prompt has {sizes[key]} tokens, the model reads {longest}')
            for key, record, sample in left if sizes[key] > longest])
  return [job for job in left if sizes[job[0]] <= longest]


@jax.jit
def _mix(w):
  """Two 32-bit sums over an array's float32 bits, each mixed with its place: exact in any order."""
  bits = jax.lax.bitcast_convert_type(w.astype(jnp.float32), jnp.uint32)
  place, stride = jnp.zeros(w.shape, jnp.uint32), 1
  for axis in reversed(range(w.ndim)):
    place += jax.lax.broadcasted_iota(jnp.uint32, w.shape, axis) * np.uint32(stride % 2 ** 32)
    stride *= w.shape[axis]
  sums = []
  for odd in (0x9E3779B1, 0x85EBCA77):
    x = bits ^ (place * np.uint32(odd) + np.uint32(odd >> 3))
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    sums.append(jnp.sum(x ^ (x >> 16), dtype=jnp.uint32))
  return jnp.stack(sums)


def fingerprint(model, tokenizer):
  """Hex digits that change with any weight, its type, the model's settings or the vocabulary."""
  sums = [np.asarray(_mix(w)).tolist() for w in jax.tree.leaves(model)]
  vocabulary = hashlib.blake2b(tokenizer.file.read_bytes()).hexdigest()
  return store.digest(sums, str(model.embed_VD.dtype), dataclasses.asdict(model.spec), vocabulary,
                      size=8)
