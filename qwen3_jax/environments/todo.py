"""A to-do list that keeps its state, and instructions whose goal is a final list."""
import collections

from qwen3_jax.environments.environment import Environment, Refused, progress, tool

ITEMS, LENGTH = 200, 200  # of a list; characters of an item
_VERBS = ('call', 'pay', 'clean', 'book', 'repair', 'water', 'return', 'print', 'order', 'paint',
          'sort', 'wash', 'check', 'move', 'sell')
_THINGS = ('the plumber', 'the rent', 'the kitchen', 'a table for four', 'the bicycle',
           'the tomatoes', 'the library books', 'the tickets', 'new gloves', 'the fence',
           'the letters', 'the curtains', 'the smoke alarm', 'the old sofa', 'the piano')


class Todo(Environment):
  """Settings: `items`, a list of {'id', 'text', 'done'}, and `goal`, a list of {'text', 'done'}.

  Neither ids nor order count for the goal. New items get the next free id.
  """
  tools = (
    tool('list_items', 'Lists all items with their ids, and whether they are done.'),
    tool('add_item', 'Adds an item that is not done; the result has its id.', ['text'],
         text={'type': 'string', 'minLength': 1, 'maxLength': LENGTH}),
    tool('complete_item', 'Marks an item as done.', ['id'], id={'type': 'integer'}),
    tool('remove_item', 'Removes an item.', ['id'], id={'type': 'integer'}))

  def begin(self, settings):
    self.items = {item['id']: (item['text'], item['done']) for item in settings['items']}
    self.start, self.aim = _count(self.items.values()), _count(
      (item['text'], item['done']) for item in settings['goal'])
    self.free = max(self.items, default=0) + 1

  def call(self, name, arguments):
    if name == 'list_items':
      lines = [f'{id}: [{"x" if done else " "}] {text}' for id, (text, done) in self.items.items()]
      return '\n'.join(lines) or 'The list is empty.'
    if name == 'add_item':
      if len(self.items) >= ITEMS:
        raise Refused(f'the list is full: it holds {ITEMS} items')
      self.items[self.free] = (arguments['text'].strip(), False)
      self.free += 1
      return f'Added item {self.free - 1}.'
    id = arguments['id']
    if id not in self.items:
      raise Refused(f'there is no item {id}')
    text, _ = self.items.pop(id) if name == 'remove_item' else self.items[id]
    if name == 'remove_item':
      return f'Removed "{text}".'
    self.items[id] = (text, True)
    return f'Completed "{text}".'

  def goal(self):
    end = _count(self.items.values())
    return {'goal': float(end == self.aim), 'progress': progress(self.start, end, self.aim)}


def _count(items):
  return collections.Counter(items)


def make(rng, difficulty):
  """(question, settings, plan): `difficulty` changes to a list of up to 12 items."""
  things = rng.sample(_THINGS, 2 + 2 * difficulty)
  texts = [f'{rng.choice(_VERBS)} {thing}' for thing in things]
  first = rng.randint(1, 40)
  items = [{'id': first + k, 'text': text, 'done': rng.random() < 0.2}
           for k, text in enumerate(texts)]
  left, goal, asked, calls = rng.sample(items, len(items)), [dict(i) for i in items], [], []
  for _ in range(difficulty):
    wish, made, goal = _change(rng, left, goal)
    asked.append(wish)
    calls += made
  question = ('Change my to-do list: ' if len(asked) > 1 else 'Please change my to-do list: ') + (
    '; '.join(asked)) + '. Leave everything else as it is.'
  plan = [('I need the ids of the items, so I list them first.',
           [{'name': 'list_items', 'arguments': {}}])]
  plan += [(f'The list is known. To do now: {"; ".join(asked[k:k + 3])}.', calls[k:k + 3])
           for k in range(0, len(calls), 3)]
  plan.append(('Every change is made.', 'The list is up to date.'))
  goal = [{'text': item['text'], 'done': item['done']} for item in goal]
  return question, {'items': items, 'goal': goal, 'turns': len(plan) + 3}, plan


def _change(rng, left, goal):
  """One change to an item of `left`, which is used up: (words, calls, new goal)."""
  kind = rng.choice(('add', 'complete', 'remove'))
  item = left.pop()
  if kind == 'complete' and item['done']:
    kind = 'remove'
  if kind == 'add':
    text = f'{rng.choice(_VERBS)} {rng.choice(("Ada", "Ben", "Chen", "Dora"))} a present'
    text = f'{text} no. {len(left)}'
    made = {'name': 'add_item', 'arguments': {'text': text}}
    return f'add "{text}"', [made], [*goal, {'text': text, 'done': False}]
  made = {'name': f'{kind}_item', 'arguments': {'id': item['id']}}
  if kind == 'remove':
    return f'remove "{item["text"]}"', [made], [i for i in goal if i.get('id') != item['id']]
  goal = [{**i, 'done': True} if i.get('id') == item['id'] else i for i in goal]
  return f'mark "{item["text"]}" as done', [made], goal
