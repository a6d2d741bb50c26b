"""Prints what the text-only rules find and how fast: python tests/benchmarks/filters.py [PART ...]

Parts: decontaminate, duplicates, rules, all (the default). Needs ../shared/data beside the
repository. Speed is CPU time of one process, so that a busy machine does not change it much; the
rules are pure functions, so two processes over halves of the data do twice as much.
"""

import functools
import gzip
import json
import random
import re
import sys
import time
from multiprocessing import get_context
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
DATA = REPO.parent / 'shared' / 'data'
sys.path.insert(0, str(REPO))

from qwen3_jax.data import decontaminate, duplicates, filters  # noqa: E402
from qwen3_jax.rewards import answers  # noqa: E402
from qwen3_jax.text import languages, repetition  # noqa: E402


def read(name, folder=DATA):
  """Records of a JSONL file; text splits on newlines only."""
  path = folder / name
  with (gzip.open if path.suffix == '.gz' else open)(path, 'rt', encoding='utf-8') as file:
    return [json.loads(line) for line in file.read().split('\n') if line.strip()]


# Decontamination.

def disguise(text, draw, page):
  """Forms in which a test item may come: a dict from the form's name to the text."""
  words = text.split()
  total = len(decontaminate.tokenise(text))
  count = next(n for n in range(1, len(words) + 1)
               if len(decontaminate.tokenise(' '.join(words[:n]))) >= 0.6 * total)
  spaced = re.sub(r'\s+', lambda m: draw.choice((' ', '  ', '\n', '\t ', '\n\n')), text)
  latex = re.sub(r'\\[dt]?frac', lambda m: draw.choice((r'\frac', r'\dfrac', r'\tfrac')), text)
  latex = re.sub(r'(?<!\\left)(?<!\\)\(', r'\\left(', re.sub(r'(?<!\\right)(?<!\\)\)', r'\\right)',
                                                            latex))
  latex = re.sub(r'([=+<>])', r' \\, \1\\; ', latex).replace('$', '$ ')
  start = draw.randrange(len(page) // 2)
  return {
    'verbatim': text, 'white space': spaced, 'lower case': text.lower(),
    'upper case': re.sub(r'(?<![\\a-zA-Z])[a-z]+', lambda m: m[0].upper(), text),
    'LaTeX spacing': latex, 'cut to 60 %': ' '.join(words[:count]),
    'in a page': f'{page[:start]}\n\n{text}\n\n{page[start:]}',
    'multiple choice': f'Question 3. {text}\n(A) 12\n(B) 15\n(C) 18\n(D) none of these\nAnswer:'}


def plant(count=300, seed=0):
  """(items, training questions of the same subjects) with `count` items of the MATH test set."""
  draw = random.Random(seed)
  chosen = draw.sample(read('math/test4500_with_solutions.jsonl.gz'), count)
  return ({f'math/{i}': row['problem'] for i, row in enumerate(chosen)},
          read('math/train_answers.jsonl.gz'), {row['type'] for row in chosen})


def show_decontamination():
  items, train, subjects = plant()
  pages = [row['text'][:4000] for row in read('lm_text/math_openlogic.train.jsonl.gz')]
  draw = random.Random(1)
  index = decontaminate.Index.build(items)
  sizes = {name: len(decontaminate.tokenise(text)) for name, text in items.items()}
  print(f'{len(items)} items, {sum(n < 13 for n in sizes.values())} of them under 13 tokens')
  found, missed = {}, {}
  for name, text in items.items():
    for form, variant in disguise(text, draw, draw.choice(pages)).items():
      match = index.check(variant)
      found[form] = found.get(form, 0) + (match is not None)
      if match is None:
        missed.setdefault(form, []).append((sizes[name], text))
  for form, count in found.items():
    print(f'  {form:16} {count}/{len(items)}', *(f'\n      missed {n} tokens: {text[:90]!r}'
                                                 for n, text in missed.get(form, ())))
  start = time.process_time()
  hits = [(row, match) for row in train if row['type'] in subjects
          and (match := index.check(row['problem']))]
  spent = time.process_time() - start
  print(f'training questions of the same subjects: {len(hits)} of {len(train)} match '
        f'({len(hits) / len(train):.2%}), {spent / len(train) * 1e3:.3f} ms each')
  for row, match in hits:
    print(f'  {match.length:3} tokens, {match.share:.0%}\n    train {row["problem"][:230]!r}\n'
          f'    test  {items[match.item][:230]!r}')
  show_pairs()


def show_pairs():
  """Real pairs of data sets: how many of one match an item of the other."""
  math = {f'test/{i}': row['problem']
          for i, row in enumerate(read('math/test4500_with_solutions.jsonl.gz'))}
  math |= {f'train/{i}': row['problem']
           for i, row in enumerate(read('math/train_answers.jsonl.gz'))}
  start = time.process_time()
  index = decontaminate.Index.build(math)
  print(f'index of {len(math)} MATH questions: {time.process_time() - start:.1f} s, '
        f'{len(index.phrases)} runs of boilerplate')
  mmlu = read('svamp_cmath_mmlu/mmlu_stem_dev.jsonl')
  hits = [(row['question'], match) for row in mmlu if (match := index.check(row['question']))]
  print(f'of {len(mmlu)} MMLU-STEM questions (whose 155 verbatim in MATH were taken out) match: '
        f'{len(hits)}', *(f'\n  {text[:100]!r}: {match.text[:100]!r}' for text, match in hits))
  small = decontaminate.Index.build([row['problem'] for row in read('math/math500_dev.jsonl')])
  hits = sum(small.check(text) is not None for text in math.values())
  print(f'MATH questions that match one of {len(small.items)} MATH-500 questions: {hits} of '
        f'{len(math)} ({hits / len(math):.2%})')
  gsm = decontaminate.Index.build(
    [row['question'] for row in read('gsm8k/test_dev_first250.jsonl')])
  train = read('gsm8k/train.jsonl.gz')
  hits = sum(gsm.check(row['question']) is not None for row in train)
  print(f'GSM8K train questions that match one of 250 test questions: {hits} of {len(train)}')


# Duplicates.

def show_duplicates():
  """Precision and recall of near duplicates against exact Jaccard similarity of all pairs."""
  texts = [row['problem'] for row in read('math/train_answers.jsonl.gz')]
  texts += [row['text'] for row in read('lm_text/udhr.train.jsonl.gz')]
  texts += [row['conversations'][0]['value'] for row in read('sft/glaive_toolcall_zh.jsonl.gz')]
  draw = random.Random(0)
  for text in draw.sample(texts, 600):
    words = text.split() if ' ' in text else list(text)
    for _ in range(draw.randrange(1, 2 + len(words) // 40)):
      words[draw.randrange(len(words))] = draw.choice(('one', 'two', 'the', '7', 'x'))
    texts.append((' ' if ' ' in text else '').join(words))
  draw.shuffle(texts)
  sets = [duplicates.shingle(text) for text in texts]
  where = {}
  for i, grams in enumerate(sets):
    for gram in grams:
      where.setdefault(gram, []).append(i)
  for threshold in (0.7, 0.8, 0.9):
    show_threshold(threshold, texts, sets, where)


def show_threshold(threshold, texts, sets, where):
  keeper = duplicates.Deduplicator(threshold)
  kept, wrong, near, missed, right = [], 0, 0, 0, 0
  start = time.process_time()
  verdicts = [keeper.check(i, text) for i, text in enumerate(texts)]
  spent = time.process_time() - start
  alive = set()
  for i, verdict in enumerate(verdicts):
    # A frequent shingle says little: candidates share one that fewer than 100 texts have.
    others = {j for gram in sets[i] if len(where[gram]) < 100 for j in where[gram] if j in alive}
    best = max((duplicates.jaccard(sets[i], sets[j]) for j in others), default=0.0)
    true = best >= threshold
    right += true and verdict is not None
    missed += true and verdict is None
    wrong += not true and verdict is not None
    near += not true and verdict is not None and best >= threshold - 0.1
    if verdict is None:
      alive.add(i)
  kept = len(alive)
  print(f'threshold {threshold}: {len(texts)} texts, {kept} kept; recall {right}/{right + missed}, '
        f'precision {right}/{right + wrong} ({near} of the {wrong} wrong ones within 0.1 of it); '
        f'{spent / len(texts) * 1e3:.3f} ms a text')


# Rules and their speed.

def corpora():
  """Name -> documents of the sizes the pipeline sees."""
  pages = {name: [row['text'] for row in read(f'lm_text/{name}.train.jsonl.gz')]
           for name in ('books_en', 'opensource_guide', 'math_openlogic', 'udhr')}
  return {
    'GSM8K answers': [row['answer'] for row in read('gsm8k/train.jsonl.gz')],
    'MATH solutions': [row['solution'] for row in read('math/test4500_with_solutions.jsonl.gz')],
    'lm_text pages': [text[:2000] for texts in pages.values() for text in texts]}


@functools.cache
def prepare():
  """Indices that a process needs: decontamination, similar validation items."""
  tests = {f'gsm8k/{i}': row['question']
           for i, row in enumerate(read('gsm8k/test_dev_first250.jsonl'))}
  tests |= {f'math/{i}': row['problem'] for i, row in enumerate(read('math/math500_dev.jsonl'))}
  return decontaminate.Index.build(tests), filters.Similar(tests.items())


def rules():
  """Name -> rule of (text, final answer or '')."""
  index, similar = prepare()
  keeper = duplicates.Deduplicator()
  return {
    'repetition': lambda text, final: repetition.find_repetition(text),
    'language mixing': lambda text, final: languages.find_mixing(text),
    'guess': lambda text, final: filters.find_guess(text, f'The answer is {final}.'),
    'inconsistency': lambda text, final: filters.find_inconsistency(text, f'\\boxed{{{final}}}'),
    'similar': lambda text, final: filters.find_similar(text, similar),
    'unverifiable': lambda text, final: filters.find_unverifiable(text),
    'decontamination': lambda text, final: decontaminate.find_contamination(text, index),
    'duplicates': lambda text, final: keeper.check(len(keeper), text)}


def time_rules(documents):
  """{rule: CPU seconds} for all rules over (text, final answer) pairs."""
  spent = {}
  for name, rule in rules().items():
    rule(*documents[0])
    start = time.process_time()
    for text, final in documents:
      rule(text, final)
    spent[name] = time.process_time() - start
  return spent


def show_rules():
  everything = []
  for name, texts in corpora().items():
    finals = [answers.find_boxed(text) or text.rpartition('####')[2].strip()[:40] for text in texts]
    documents = list(zip(texts, finals))
    everything += documents
    spent = time_rules(documents)
    size = sum(map(len, texts)) / len(texts)
    print(f'{name}: {len(texts)} documents of {size:.0f} characters, '
          f'{sum(spent.values()) / len(texts) * 1e3:.2f} ms each, '
          f'{len(texts) / sum(spent.values()) * 60:,.0f} a minute and process')
    print('  ms: ' + ', '.join(f'{rule} {s / len(texts) * 1e3:.3f}' for rule, s in spent.items()))
  start = time.perf_counter()
  with get_context('spawn').Pool(2) as pool:
    pool.map(time_rules, [everything[:100], everything[100:200]])  # imports and indices
    begun = time.perf_counter()
    spent = pool.map(time_rules, [everything[::2], everything[1::2]])
  wall = time.perf_counter() - begun
  cpu = max(sum(part.values()) for part in spent)
  print(f'all {len(everything)} in two processes: {len(everything) / wall * 60:,.0f} a minute by '
        f'the clock, {len(everything) / cpu * 60:,.0f} by CPU time (start {begun - start:.1f} s)')


def main():
  parts = sys.argv[1:] or ['all']
  for name, show in (('decontaminate', show_decontamination), ('duplicates', show_duplicates),
                     ('rules', show_rules)):
    if name in parts or 'all' in parts:
      print(f'== {name}')
      show()


if __name__ == '__main__':
  main()
