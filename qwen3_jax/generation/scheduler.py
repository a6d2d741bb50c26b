"""Who decodes next: a pure function of the requests and of what was drawn, never of time.

Rows are served in the order of their requests. A shard is one device's part of the rows and pages.
"""
import heapq


class Scheduler:
  """The texts that wait, those that run, and their pages.

  `pages` has one `Pages` a shard, `rows` may run on each, and a call adds `chunk` tokens at most.
  `grow(count)` gives every shard at least that many pages; None: there are no more.
  """

  def __init__(self, texts, pages, rows, chunk, grow=None):
    self.waiting = [(text.index, text) for text in texts]
    self.pages, self.rows, self.chunk, self.grow = pages, rows, chunk, grow
    self.running = [{} for _ in pages]  # of each shard, by index
    self.preempted = 0

  def plan(self):
    """Gives every running text the pages it needs, lets waiting ones join; all that run now."""
    for text in sorted(self.all(), key=lambda text: text.index):
      if text.index in self.running[text.shard]:
        self._extend(text)
    waves = {}
    while self.waiting and self._admit(self.waiting[0][1], waves):
      heapq.heappop(self.waiting)
    return self.all()

  def all(self):
    return [text for running in self.running for text in running.values()]

  def leave(self, text):
    """Frees the text's pages at once."""
    del self.running[text.shard][text.index]
    self.release(text)
    for page in text.pages:
      self.pages[text.shard].drop(page)
    text.pages, text.cached = [], 0

  def release(self, text):
    """Drops the page that the text read once from another's."""
    if text.borrowed is not None:
      self.pages[text.shard].drop(text.borrowed)
      text.borrowed = None

  def _columns(self, text):
    """Pages that hold the text after the next call."""
    longest = min(len(text.ids) + self.chunk, text.prompt + text.room)
    return -(-longest // self.pages[text.shard].size)

  def _extend(self, text):
    """Pages for the next call, from the youngest if need be; the youngest may be itself."""
    pages, need = self.pages[text.shard], self._columns(text) - len(text.pages)
    if need > len(pages.free) and self.grow:
      self.grow(pages.count + need - len(pages.free))
    while need > len(pages.free):
      youngest = self.running[text.shard][max(self.running[text.shard])]
      self.leave(youngest)
      heapq.heappush(self.waiting, (youngest.index, youngest))
      self.preempted += 1
      if youngest is text:
        return
    text.pages += pages.take(max(need, 0))

  def _admit(self, text, waves):
    """Whether the text runs from now on. `waves` maps pages filled in this round to when."""
    ids, offers = text.ids[:-1], []
    for shard, (pages, running) in enumerate(zip(self.pages, self.running)):
      if len(running) < self.rows:
        offers.append((*pages.find(ids), shard))
    if not offers:
      return False
    full, rest, source, shard = max(offers, key=lambda offer: (
      len(offer[0]) + (offer[1] is not None), -len(self.running[offer[3]]), -offer[3]))
    pages, text.shard = self.pages[shard], shard
    need = self._columns(text) - len(full)
    if need > len(pages.free) and self.grow:
      self.grow(pages.count + need - len(pages.free))
    reserve = 0 if self.grow else len(self.running[shard])  # lest one is preempted soon
    if self.running[shard] and need + reserve > len(pages.free):
      return False
    for page in (*full, rest) if rest is not None else full:
      pages.hold(page)
    text.pages, text.borrowed, text.source = full + pages.take(need), rest, source
    text.cached = len(ids) if rest is not None else len(full) * pages.size
    text.wave = max((waves.get(page, 0) for page in (*full, rest)), default=0)
    waves.update({page: text.wave + 1 for page in text.pages[len(full):]})
    if rest is None:
      pages.name(ids, text.pages, text)
    self.running[shard][text.index] = text
    return True
