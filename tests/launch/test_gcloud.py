"""Google's own gcloud accepts the calls; a server on this machine stands in for its API."""
import http.server
import json
import shutil
import threading

import pytest

from launch import shapes
from launch.cloud import Cloud, Request

pytestmark = pytest.mark.skipif(
  not shutil.which('gcloud'), reason='needs hardware or a Google Cloud CLI: no gcloud on PATH')


@pytest.fixture
def api(monkeypatch, tmp_path):
  """[(method, path, body)] of what gcloud asks; nothing exists, and everything succeeds."""
  asked = []

  class Handler(http.server.BaseHTTPRequestHandler):
    def answer(self):
      size = int(self.headers.get('content-length') or 0)
      body = json.loads(self.rfile.read(size)) if size else None
      asked.append((self.command, self.path.partition('?')[0].rpartition('/')[2], body))
      missing = self.command == 'GET' and 'queuedResources/' in self.path
      none = {'error': {'code': 404, 'message': 'none', 'status': 'NOT_FOUND'}}
      done = {'name': 'projects/p/locations/z/operations/o', 'done': True}
      data = json.dumps(none if missing else done).encode()
      self.send_response(404 if missing else 200)
      self.send_header('content-type', 'application/json')
      self.send_header('content-length', str(len(data)))
      self.end_headers()
      self.wfile.write(data)
    do_GET = do_POST = do_DELETE = answer

    def log_message(self, *_):
      pass
  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  (tmp_path / 'token').write_text('x')
  for name, value in dict(
      CONFIG=tmp_path, AUTH_ACCESS_TOKEN_FILE=tmp_path / 'token', CORE_DISABLE_PROMPTS=1,
      CORE_DISABLE_USAGE_REPORTING=1, COMPONENT_MANAGER_DISABLE_UPDATE_CHECK=1,
      API_ENDPOINT_OVERRIDES_TPU=f'http://127.0.0.1:{server.server_port}/').items():
    monkeypatch.setenv(f'CLOUDSDK_{name}', str(value))
  yield asked
  server.shutdown()


def test_calls_are_accepted(api):
  cloud = Cloud('us-east5-a', 'p')
  assert cloud.state('qwen3-r') is None
  for tpu, capacity, slices in (('v5p:16', 'spot', 1), ('v6e:4x8', 'reserved', 4),
                                ('v5e:8', 'on-demand', 1)):
    piece = shapes.parse(tpu)
    cloud.create(Request('r', piece, slices, capacity, 'v'))
    method, _, body = api[-1]
    (spec,) = body['tpu']['nodeSpec']
    assert method == 'POST' and spec['node']['acceleratorType'] == piece.accelerator
    assert spec['node']['labels'] == {'qwen3-jax-run': 'r'}
    assert spec['node']['runtimeVersion'] == 'v'
    assert body['queueingPolicy'] == {'validUntilDuration': '43200s'}
    assert ('spot' in body) == (capacity == 'spot')
    assert ('reservationName' in body) == (capacity == 'reserved')
    assert spec.get('multisliceParams', {}).get('nodeCount', 1) == slices
  cloud.delete('qwen3-r')
  assert api[-1][:2] == ('DELETE', 'qwen3-r')
  assert cloud.list_names('r') == []
