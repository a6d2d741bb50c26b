"""Prints what the reward rules say of real texts, and their cost: python tests/benchmarks/rules.py

Needs ../shared/data beside the repository. All the texts are right, so each point below 100 % is a
false alarm (a few MATH solutions do repeat themselves, a few Chinese answers follow a question in
English, one Swahili text is Chimwiini). Cost is CPU time of one process.
"""

import gzip
import json
import sys
import time
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
DATA = REPO.parent / 'shared' / 'data'
sys.path.insert(0, str(REPO))

from qwen3_jax.rewards import form, instructions, penalties  # noqa: E402
from qwen3_jax.rewards.response import Response  # noqa: E402

CASES = ('change_case:english_lowercase', 'change_case:english_capital')


def read(name):
  path = DATA / name
  with (gzip.open if path.suffix == '.gz' else open)(path, 'rt', encoding='utf-8') as file:
    return [json.loads(line) for line in file.read().split('\n') if line]


def read_pairs():
  """{name: [(question, right answer)]}."""
  chats = [chat['conversations'] for chat in read('sft/glaive_toolcall_zh.jsonl.gz')[:300]]
  return {
    'GSM8K': [(row['question'], row['answer']) for row in read('gsm8k/test_dev_first250.jsonl')],
    'MATH': [(row['problem'], row['solution'])
             for row in read('math/test4500_with_solutions.jsonl.gz')[:1000]],
    'Glaive, Chinese': [(asked['value'], said['value']) for chat in chats
                        for asked, said in zip(chat, chat[1:])
                        if (asked['from'], said['from']) == ('human', 'gpt')]}


def follows(id, text, **arguments):
  return instructions.follow([{'id': id, 'kwargs': arguments}], text)[0]


def rate(verify, pairs):
  """The mean score, and milliseconds for each."""
  given = [({'messages': [{'role': 'user', 'content': asked}], 'limit': {'min': 1}},
            Response.read(f'<think>\n{answer}\n</think>\n\n{answer}', 100))
           for asked, answer in pairs]
  verify(*given[0])
  begin = time.process_time()
  scores = [verify(*one) for one in given]
  return sum(scores) / len(scores), (time.process_time() - begin) / len(scores) * 1e3


def main():
  for name, pairs in read_pairs().items():
    plain = [(asked, answer) for asked, answer in pairs if answer.strip()]
    for verify in (penalties.language, penalties.repetition, form.mode, form.length):
      mean, cost = rate(verify, plain)
      print(f'{name}: {verify.__name__} {mean:.2%} of {len(plain)}, {cost:.2f} ms each')
  texts = [answer for _, answer in read_pairs()['GSM8K']]
  for id, change in zip(CASES, (str.lower, str.upper)):
    print(f'GSM8K: {id} {sum(follows(id, change(text)) for text in texts)} of {len(texts)}')
  rows = [row for row in read('lm_text/udhr.train.jsonl.gz') if len(row['lang']) == 2]
  for lang in sorted({'ar', 'bg', 'bn', 'de', 'en', 'fa', 'fi', 'gu', 'hi', 'it', 'ja', 'kn', 'ko',
                      'ne', 'pa', 'ru', 'sw', 'ta', 'te', 'th', 'uk', 'ur', 'zh'}):
    own = [row['text'][i:i + 800] for row in rows if row['lang'] == lang
           for i in range(500, 4000, 900) if row['text'][i:]]
    if own:
      right = sum(follows('language:response_language', text, language=lang) for text in own)
      print(f'UDHR: language:response_language {lang} {right} of {len(own)}')


if __name__ == '__main__':
  main()
