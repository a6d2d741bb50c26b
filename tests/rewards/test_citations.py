"""Answers with good, made-up, missing and padded citations."""

import pytest

from qwen3_jax.rewards import citations
from qwen3_jax.rewards.response import Response

DOCUMENTS = [
  {'id': '1', 'text': 'The Ada bridge was opened in 1932. It is 1,149 metres long, made of steel.'},
  {'id': 'tides', 'text': 'Tides follow the Moon. The range in the bay is twelve metres in May.'}]
RECORD = {'documents': DOCUMENTS, 'answer': ['1932']}


def score(text, **changes):
  return citations.verify(RECORD | changes, Response.read(text, 10))


@pytest.mark.parametrize('text', [
  'The Ada bridge was opened in 1932 [1: "Ada bridge was opened in 1932"].',
  'The Ada bridge was opened in 1932. [1: “was OPENED  in\n1932”]',
  'The bridge was opened in 1932 [1].',
  'The bridge was opened in 1932 [1: "was opened in 1932"]. The tides in the bay have a range of '
  'twelve metres [tides: "range in the bay is twelve metres"].',
  'Which year? The Ada bridge opened, as here [see note], in 1932 [1, tides].'])
def test_cited_answers_get_all(text):
  assert score(text) == 1


@pytest.mark.parametrize('text, expected', [
  ('', 0), ('1932', 0), ('The bridge was opened in 1932.', 0),
  ('The bridge was opened in 1932 [3: "was opened in 1932"].', 0),
  ('The bridge was opened in 1932 [1: "it was opened in 1932 by the king"].', 0),
  ('The bridge was opened in 1932 [tides: "was opened in 1932"].', 0),
  ('The bridge was opened in 1932 [1: "1932"].', 0),
  ('The bridge was opened in 1945 [1: "was opened in 1932"].', 0),
  ('The bridge was opened in 1932 [1: "was opened in 1932"]. Its architect was Ralph Freeman.', .5),
  ('The bridge was opened in 1932 [1: "was opened in 1932"] [1: "in the year 1932"].', .5),
  ('The year is 1932 in tide tables [tides: "The range in the bay"].', 0),
  ('In 1932 dragons paid nine kings for golden apples [1: "was opened in 1932"].', 0)])
def test_unfounded_claims_and_citations_cost(text, expected):
  assert score(text) == expected


def test_an_answer_that_the_cited_text_lacks_is_worth_half():
  text = 'Tides follow the Moon since always [tides: "Tides follow the Moon"] ({}).'
  assert score(text.format('sic'), answer='always') == 0.5
  assert score(text.format('see 1932'), answer='Moon') == 0  # the number is nowhere cited
  assert score(text.format('sic'), answer='Moon') == 1


def test_unanswerable_questions_want_a_refusal():
  refusals = ['The documents do not say who built it.', 'I cannot answer this from the documents.',
              "There isn't enough information in the sources.", '文档中没有提到这一点。']
  for text in refusals:
    assert score(text, answerable=False) == 1 and score(text) == 0
  assert score('The king built it.', answerable=False) == 0
  assert score('The documents do not say [1: "made of steel"].', answerable=False) == 0
  exact = dict(answerable=False, refusal='Not in the documents')
  assert score('not in the documents.', **exact) == 1 and score(refusals[0], **exact) == 0
  assert score('The bridge was opened in 1932 [1]. Not in the documents.',
               refusal='Not in the documents') == 0


def test_repeating_and_quoting_everything_gain_nothing():
  claim = 'The bridge was opened in 1932 [1: "was opened in 1932"]. '
  assert score(claim * 100 + 'The king built it all alone.') == pytest.approx(100 / 101)
  assert score(claim * 201) == 0
  long = [{'id': '1', 'text': 'it was opened in 1932 ' * 50}]
  assert score(f'It was opened in 1932 [1: "{long[0]["text"][:-30]}"].', documents=long) == 0


def test_records_without_documents_are_refused():
  with pytest.raises(ValueError, match='no documents'):
    score('x', documents=[])
