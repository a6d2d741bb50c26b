"""Asks a model for answers: one that the engine runs, or one behind an OpenAI-compatible endpoint.

A responder has one method, `respond`. For each conversation it gives a list of `n` Answers, or one
Failure: an answer that could not be had, which says nothing about the question or the model.
"""
import concurrent.futures
import dataclasses
import hashlib
import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request

from qwen3_jax.text.template import parse, render

REPLY_BYTES = 64 * 1024 * 1024
LONGEST_WAIT = 60.0  # seconds between two tries


@dataclasses.dataclass(frozen=True)
class Answer:
  """`text` as the model wrote it, and its two parts."""
  text: str
  reasoning: str
  content: str
  finish_reason: str  # 'stop', 'length' or what else an endpoint says


@dataclasses.dataclass(frozen=True)
class Failure:
  """No answer for a reason that lies in the machinery. Never a score, never a verdict."""
  reason: str


def open_responder(spec, load=None, **options):
  """Responder of `spec`: 'http(s)://host:port/v1', with '#model-name' if it serves several, or a
  model's folder, which `load` (`stages.load.load_model`) opens as (model, tokenizer).

  `options` go to `Endpoint` or `Engine`. Raises ValueError where a folder cannot be opened here.
  """
  if re.match(r'https?://', spec):
    return Endpoint(spec, **options)
  if load is None:
    raise ValueError(f'{spec} is not an http(s) address, and a folder needs `load` to open it')
  return Engine(*load(spec), **options)


def seed_of(conversation, place):
  """32 bits that depend on the conversation and the number of the try alone."""
  text = json.dumps([conversation, place], ensure_ascii=False, sort_keys=True)
  digest = hashlib.blake2b(text.encode(errors='surrogatepass'), digest_size=4).digest()
  return int.from_bytes(digest, 'big') >> 1


class Engine:
  """A model in memory. What a prompt draws depends on its text and the number of the try alone."""

  def __init__(self, model, tokenizer, rows=64, thinking_budget=None):
    from qwen3_jax.generation import engine
    self.decoder, self.tokenizer = engine.prepare(model, rows), tokenizer
    self.rows, self.thinking_budget = rows, thinking_budget

  def respond(self, conversations, n=1, sampling=None, enable_thinking=True, first=0):
    """For each conversation (a list of messages) a list of `n` Answers, or a Failure.

    `sampling` None: what the Qwen3 report uses in the mode. `first` numbers the first try, so that
    a later call draws anew. A conversation that cannot be rendered or is too long is a Failure.
    """
    from qwen3_jax.generation import engine
    from qwen3_jax.generation import sampling as settings
    sampling = sampling or (settings.THINKING if enable_thinking else settings.NON_THINKING)
    prompts = [self._encode(each, enable_thinking) for each in conversations]
    asked = [(place, k) for place, prompt in enumerate(prompts) if isinstance(prompt, list)
             for k in range(first, first + n)]
    outputs = engine.generate(
      self.decoder, self.tokenizer, [prompts[place] for place, _ in asked], sampling,
      self.thinking_budget if enable_thinking else None,
      [seed_of(conversations[place], k) for place, k in asked], rows=self.rows) if asked else []
    answers = [[] if isinstance(prompt, list) else prompt for prompt in prompts]
    for (place, _), out in zip(asked, outputs):
      answers[place].append(_answer(out.text, out.finish_reason))
    return answers

  def _encode(self, conversation, enable_thinking):
    try:
      text = render(conversation, enable_thinking=enable_thinking, add_generation_prompt=True)
    except ValueError as e:
      return Failure(f'the conversation cannot be rendered: {e}')
    ids, longest = self.tokenizer.encode(text), self.decoder.model.spec.max_position
    if len(ids) >= longest:
      return Failure(f'the prompt has {len(ids)} tokens, the model takes {longest - 1}')
    return ids


class Endpoint:
  """A model behind POST `url`/chat/completions; the key is that of $OPENAI_API_KEY, if set.

  `workers` requests are under way at once. Refused connections, timeouts, HTTP 408, 429 and 5xx,
  and replies that are not JSON or lack a field are tried again, up to `tries` times, `wait`
  seconds later and twice as long each time (or as long as the server's Retry-After says).
  """

  def __init__(self, url, workers=16, tries=5, wait=1.0, timeout=600.0):
    url, _, self.model = url.partition('#')
    self.url = url.rstrip('/') + '/chat/completions'
    self.workers, self.tries, self.wait, self.timeout = workers, tries, wait, timeout

  def respond(self, conversations, n=1, sampling=None, enable_thinking=True, first=0):
    """As `Engine.respond`; `sampling` None leaves the server its own settings.

    Only `enable_thinking=False` is sent (as `chat_template_kwargs`, which vLLM, SGLang and
    llama.cpp read), as are `top_k` and `min_p` only where set: not every server knows them.
    """
    asked = [(conversation, k) for conversation in conversations for k in range(first, first + n)]
    with concurrent.futures.ThreadPoolExecutor(self.workers) as pool:
      said = list(pool.map(lambda each: self._ask(*each, sampling, enable_thinking), asked))
    answers = [said[i:i + n] for i in range(0, len(said), n)]
    failed = [next((a for a in each if isinstance(a, Failure)), None) for each in answers]
    return [failure or each for failure, each in zip(failed, answers)]

  def _ask(self, conversation, place, sampling, enable_thinking):
    body = dict(messages=conversation, seed=seed_of(conversation, place))
    if self.model:
      body['model'] = self.model
    if sampling:
      body |= dict(temperature=sampling.temperature, max_tokens=sampling.max_tokens,
                   seed=(body['seed'] + sampling.seed) % 2**31)
      body |= {name: getattr(sampling, name) for name in ('top_p', 'top_k', 'min_p',
               'presence_penalty') if getattr(sampling, name) is not None}
    if not enable_thinking:
      body['chat_template_kwargs'] = dict(enable_thinking=False)
    data, wait = json.dumps(body).encode(errors='surrogatepass'), self.wait
    for left in reversed(range(self.tries)):
      answer, again = self._post(data)
      if again is None or not left:
        break
      time.sleep(min(max(wait, again), LONGEST_WAIT))
      wait *= 2
    return answer

  def _post(self, data):
    """(Answer or Failure, seconds to wait at least before another try; None: another is no use)."""
    headers = {'Content-Type': 'application/json'}
    if key := os.environ.get('OPENAI_API_KEY'):
      headers['Authorization'] = f'Bearer {key}'
    try:
      request = urllib.request.Request(self.url, data, headers)
      with urllib.request.urlopen(request, timeout=self.timeout) as reply:
        return read_reply(reply.read(REPLY_BYTES)), None
    except urllib.error.HTTPError as e:
      with e:
        text = e.read(300).decode(errors='replace')
      asked = e.headers.get('Retry-After', '')  # seconds, or a date
      passing = e.code in (408, 429) or e.code >= 500
      again = (float(asked) if asked.isdecimal() else 0.0) if passing else None
      return Failure(f'{self.url}: HTTP {e.code}: {text}'), again
    except (OSError, http.client.HTTPException, ValueError) as e:
      reason = getattr(e, 'reason', None) or e
      return Failure(f'{self.url}: {type(e).__name__}: {reason}'), 0.0


def read_reply(data):
  """Answer in the JSON of a chat completion; ValueError says what it lacks.

  Reasoning is `reasoning_content` (or `reasoning`) beside the content, or a think block in it.
  """
  reply = json.loads(data)
  try:
    choice = reply['choices'][0]
    message, finish = choice['message'], choice.get('finish_reason') or 'stop'
    content = message.get('content')
    reasoning = message.get('reasoning_content') or message.get('reasoning') or ''
  except (KeyError, IndexError, TypeError, AttributeError):
    raise ValueError(f'a reply without choices[0].message: {data[:120]!r}') from None
  if not isinstance(reasoning, str) or not isinstance(content, str) and not (
      content is None and reasoning):
    raise ValueError(f'a reply without content: {data[:120]!r}')
  if not reasoning:
    return _answer(content, finish)
  content = (content or '').lstrip('\n')
  text = f'<think>\n{reasoning.strip()}\n' + (
    f'</think>\n\n{content}' if content or finish != 'length' else '')
  return Answer(text, reasoning.strip(), content, finish)


def _answer(text, finish_reason):
  said = parse(text)
  return Answer(text, said['reasoning_content'], said['content'], finish_reason)


def judge(responder, template, records, read, tries=3, sampling=None, enable_thinking=True):
  """The verdict of a model on each record, or a Failure where it gave none.

  `template` is the question, its {fields} taken from the record; `read(text)` makes a verdict of an
  answer and raises ValueError on anything else, which is asked again, `tries` times in all.
  """
  verdicts = [None] * len(records)
  left = list(range(len(records)))
  for k in range(tries):
    asked = [[dict(role='user', content=fill(template, records[i]))] for i in left]
    answers = responder.respond(asked, 1, sampling, enable_thinking, first=k) if left else []
    again = []
    for i, answer in zip(left, answers):
      if isinstance(answer, Failure):
        verdicts[i] = answer
        continue
      try:
        verdicts[i] = read(answer[0].content)
      except ValueError as e:
        verdicts[i] = Failure(f'no verdict in {tries} answers: {e}')
        again.append(i)
    left = again
  return verdicts


def fill(template, record):
  """`template` with each {field} that the record has; other braces stay as they are."""
  return re.sub(r'\{(\w+)\}', lambda m: str(record[m[1]]) if m[1] in record else m[0], template)


def find_object(text):
  """The last JSON object in `text`, with or without words and a code fence round it.

  Raises ValueError where there is none.
  """
  found, start = None, text.find('{')
  while start >= 0:
    try:
      found, end = json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError):
      end = start + 1
    start = text.find('{', end)
  if not isinstance(found, dict):
    raise ValueError(f'no JSON object in {text[:120]!r}')
  return found
