"""core/progress.py."""

from absl import logging

from lmm_sae.core import progress


def test_every_item_passes_in_order():
  assert list(progress.track([3, 1, 2], what='numbers')) == [3, 1, 2]


def test_an_empty_loop_says_nothing(caplog):
  logging.set_verbosity(logging.INFO)
  assert list(progress.track([], what='numbers')) == []
  assert not caplog.records


def test_the_loop_ends_with_a_line_of_count_and_rate(caplog):
  logging.get_absl_logger().addHandler(caplog.handler)
  logging.set_verbosity(logging.INFO)
  try:
    list(progress.track(iter(range(5)), total=5, what='groups'))
  finally:
    logging.get_absl_logger().removeHandler(caplog.handler)
  assert 'groups 5/5' in caplog.text
  assert '/s' in caplog.text


def test_a_line_tells_rate_and_time_left():
  text = progress.line('latents', 50, 200, 10.0)
  assert text == 'latents 50/200, 5/s, 0:10 gone, 0:30 left'


def test_a_line_without_total_has_no_time_left():
  assert progress.line('rows', 7, None, 7.0) == 'rows 7, 1/s, 0:07 gone'


def test_hours_are_shown_when_there_are_any():
  assert progress.clock(3723.4) == '1:02:03'
  assert progress.clock(59.6) == '1:00'
