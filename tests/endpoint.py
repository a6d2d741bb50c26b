"""A chat endpoint on 127.0.0.1 whose answers a test writes."""
import contextlib
import http.server
import json
import threading


@contextlib.contextmanager
def serve(answer):
  """Yields (url, requests so far); `answer(body, number)` gives a (status, bytes or message)."""
  seen, lock = [], threading.Lock()

  class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def do_POST(self):
      body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
      with lock:
        seen.append(body | dict(path=self.path, key=self.headers.get('Authorization')))
        number = len(seen) - 1
      status, said = answer(body, number)
      if isinstance(said, dict):
        finish = said.pop('finish_reason', 'stop')
        said = json.dumps(dict(choices=[dict(message=said, finish_reason=finish)])).encode()
      self.send_response(status)
      self.send_header('Content-Length', str(len(said)))
      self.end_headers()
      self.wfile.write(said)

    def log_message(self, *_):
      pass

  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
  thread = threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.01))
  thread.start()
  try:
    yield f'http://127.0.0.1:{server.server_port}/v1', seen
  finally:
    server.shutdown()
    server.server_close()
    thread.join()
