"""Which page of the cache holds what: counts of holders, and beginnings of texts to share."""


class Pages:
  """The pages of one shard, 1 .. count - 1; page 0 is nobody's.

  A page is freed when its last holder drops it. `find` and `name` let texts with equal beginnings
  hold the same pages: a page is known by the page before it and its ids, so nothing is hashed that
  is not compared.
  """

  def __init__(self, count, size, share=True):
    self.count, self.size, self.share = 1, size, share
    self.free, self.holders = [], {}
    self.known, self.key = {}, {}  # (page before, ids) -> (page, its text); page -> that key
    self.grow(count)

  def grow(self, count):
    self.free = list(range(count - 1, self.count - 1, -1)) + self.free
    self.count = count

  def take(self, count):
    """`count` free pages, held once."""
    pages = [self.free.pop() for _ in range(count)]
    self.holders.update(dict.fromkeys(pages, 1))
    return pages

  def hold(self, page):
    self.holders[page] += 1

  def drop(self, page):
    self.holders[page] -= 1
    if not self.holders[page]:
      del self.holders[page]
      self.known.pop(self.key.pop(page, None), None)
      self.free.append(page)

  def _keys(self, ids):
    """Ids of each page, the last perhaps not full."""
    return [tuple(ids[i:i + self.size]) for i in range(0, len(ids), self.size)]

  def find(self, ids):
    """Known pages that hold the beginning of `ids`: (full pages, one with all the rest or None,
    the text whose they are)."""
    pages, before, source = [], 0, None
    for part in self._keys(ids) if self.share else ():
      page, text = self.known.get((before, part), (None, None))
      if page is None:
        break
      source, before = text, page
      if len(part) < self.size:
        return pages, page, source
      pages.append(page)
    return pages, None, source

  def name(self, ids, pages, text):
    """Makes known that `pages` hold `ids`, and that they are `text`'s."""
    before = 0
    for part, page in zip(self._keys(ids) if self.share else (), pages):
      if (before, part) not in self.known and page not in self.key:
        self.known[before, part], self.key[page] = (page, text), (before, part)
      before = page
