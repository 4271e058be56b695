"""Sequences of any length: windows without seams, stretched short ones, bridged gaps, and streaming."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from fasthmr.body import encode_pose
from fasthmr.geometry.rotations import axis_angle_to_matrix, matrix_to_axis_angle
from fasthmr.geometry.slerp import resample_linear, resample_rotations, slerp
from fasthmr.sequence import (
    SequenceConfig,
    StreamingDecoder,
    fill_linear,
    fill_rotations,
    parts,
    refine,
    window_starts,
    window_weights,
)

WINDOW = 16
BETAS = torch.linspace(-1, 1, 10)


class Echo:
    """A decoder whose features are the poses, and one number by which the whole window is turned about the vertical.

    The turn is the window's first frame's, so that windows disagree where `turns` differ.
    """

    window, feature_dim, representation = WINDOW, 134, "joints_twists"

    def __init__(self, body) -> None:
        self.body, self.calls, self.steps = body, 0, 0

    def __call__(self, features: Tensor, *, steps: int = 1) -> Tensor:
        assert features.shape[1:] == (WINDOW, 134)
        self.calls, self.steps = self.calls + len(features), steps
        joints = features[..., :87].unflatten(-1, (29, 3))
        turn = axis_angle_to_matrix(torch.tensor([0.0, 1.0, 0.0]) * features[:, 0, -1:])
        return torch.cat(((joints @ turn.mT[:, None]).flatten(-2), features[..., 87:133]), dim=-1)


@pytest.fixture(scope="module")
def echo(free_body) -> Echo:
    return Echo(free_body)


def motion(frames: int, speed: float = 0.04) -> Tensor:
    """(frames, 24, 3, 3) smooth rotations in which every joint turns by about `speed` radians a frame or less."""
    generator = torch.Generator().manual_seed(0)
    axis, phase = torch.randn(24, 3, generator=generator), torch.rand(24, 1, generator=generator) * 6
    time = torch.arange(frames)[:, None, None]
    return axis_angle_to_matrix(0.6 * torch.sin(phase + time * speed / 0.6) * axis / axis.norm(dim=-1, keepdim=True))


def features_of(rotations: Tensor, body, turns: Tensor | float = 0.0) -> Tensor:
    poses = encode_pose(rotations, betas(len(rotations)), body)
    return torch.cat((poses, torch.zeros(len(poses), 1) + torch.as_tensor(turns).reshape(-1, 1)), dim=-1)


def betas(frames: int) -> Tensor:
    return BETAS.expand(frames, -1)


def angle(a: Tensor, b: Tensor) -> Tensor:
    return matrix_to_axis_angle(a.mT @ b).norm(dim=-1)


def steps(rotations: Tensor) -> Tensor:
    """(T-1,) the largest turn of any joint from a frame to the next, radians."""
    return angle(rotations[:-1], rotations[1:]).amax(-1)


def root_speed(rotations: Tensor) -> Tensor:
    """(T-1, 3) turn of the whole body from a frame to the next."""
    return matrix_to_axis_angle(rotations[:-1, 0].mT @ rotations[1:, 0])


def assert_same(ours: Tensor, wanted: Tensor, most: float = 2e-3) -> None:
    assert ours.shape == wanted.shape
    assert float(angle(ours, wanted).max()) < most  # 0.1 degrees: float32 joints through inverse kinematics


class TestSlerp:
    def test_half_way(self):
        start, end = axis_angle_to_matrix(torch.tensor([[0.0, 0, 0.2], [0, 0, 1.4]]))
        half = slerp(start, end, torch.tensor(0.5))
        torch.testing.assert_close(matrix_to_axis_angle(half), torch.tensor([0.0, 0, 0.8]))
        assert torch.equal(slerp(start, end, torch.tensor(0.0)), start)

    def test_half_a_turn_apart_is_finite_and_a_rotation(self):
        turned = slerp(torch.eye(3), torch.diag(torch.tensor([1.0, -1, -1])), torch.linspace(0, 1, 5))
        torch.testing.assert_close(turned @ turned.mT, torch.eye(3).expand(5, 3, 3), atol=1e-5, rtol=0)
        torch.testing.assert_close(angle(turned[:-1], turned[1:]), torch.full((4,), math.pi / 4), atol=1e-4, rtol=0)

    def test_rows_between_rows(self):
        rotations = motion(9)
        between = resample_rotations(rotations, torch.tensor([0.0, 2.5, 8.0]))
        assert torch.equal(between[[0, 2]], rotations[[0, 8]])
        torch.testing.assert_close(angle(between[1], rotations[2]), angle(rotations[3], between[1]), atol=1e-4, rtol=0)
        numbers = torch.tensor([[0.0, 10], [1, 20]])
        assert resample_linear(numbers, torch.tensor([0.25])).tolist() == [[0.25, 12.5]]


class TestWindows:
    def test_the_last_window_is_shifted_back(self):
        assert window_starts(40, 16, 4) == [0, 12, 24]
        assert window_starts(41, 16, 4) == [0, 12, 24, 25]
        assert window_starts(16, 16, 4) == [0]

    def test_weights_fall_towards_zero_beyond_the_window_and_add_up(self):
        weights = window_weights(16, 4)
        assert weights[4:12].tolist() == [1.0] * 8
        assert 0 < weights[0] < 0.1 and torch.equal(weights, weights.flip(0))
        torch.testing.assert_close(weights[:4] + weights[-4:], torch.ones(4))  # of two neighbouring windows

    @pytest.mark.parametrize("frames", [16, 17, 27, 28, 29, 61])
    @pytest.mark.parametrize("overlap", [0.0, 0.25, 0.9])
    def test_windows_that_agree_give_the_motion_back(self, echo, free_body, frames, overlap):
        rotations = motion(frames)
        config = SequenceConfig(overlap=overlap, batch=3)
        assert_same(refine(echo, free_body, features_of(rotations, free_body), betas(frames), None, config), rotations)

    def test_windows_that_disagree_are_blended_without_a_seam(self, echo, free_body):
        # Each window is turned by another angle. Cut hard, the motion jumps by 0.5; blended, it turns about 0.5 / 9 a
        # frame beside what it does anyhow (a smooth ramp is pi/2 times as steep in its middle as a straight one).
        frames, overlap = 61, 8
        starts = window_starts(frames, WINDOW, overlap)
        turns = torch.zeros(frames)
        turns[starts] = 0.5 * (torch.arange(len(starts)) % 2)
        turns[::WINDOW] += 0.5 * (torch.arange(4) % 2)  # where windows begin without overlap
        rotations = motion(frames)
        features = features_of(rotations, free_body, turns)
        cut, blended = (
            refine(echo, free_body, features, betas(frames), None, SequenceConfig(overlap=share))
            for share in (0.0, overlap / WINDOW)
        )
        own = float(steps(rotations).max())
        assert float(steps(cut).max()) > 0.4
        assert float(steps(blended).max()) < own + 0.5 * math.pi / 2 / (overlap + 1) + 2e-3
        # The speed has no kink either: it changes by a tenth of the jump a frame at most.
        assert float(root_speed(blended).diff(dim=0).norm(dim=-1).max()) < 0.1 * 0.5

    @pytest.mark.parametrize("difference", [0.3, 2.0, 3.1])
    def test_a_border_between_two_windows(self, echo, free_body, difference):
        # The motion stands still, so that all that turns is the blend: evenly, also nearly half a turn.
        frames, overlap = 28, 4
        turns = torch.zeros(frames)
        turns[12] = difference
        features = features_of(motion(1).expand(frames, -1, -1, -1), free_body, turns)
        result = refine(echo, free_body, features, betas(frames), None, SequenceConfig(overlap=overlap / WINDOW))
        turned = angle(result[:1, 0], result[:, 0])
        assert float(turned[11]) < 2e-3 and float(turned[-1]) == pytest.approx(difference, abs=2e-3)
        assert float(turned.diff().min()) > -2e-3
        assert float(turned.diff().max()) < difference * math.pi / 2 / (overlap + 1)

    def test_denoising_steps_are_passed_on(self, echo, free_body):
        refine(echo, free_body, features_of(motion(3), free_body), betas(3), None, SequenceConfig(steps=4))
        assert echo.steps == 4


class TestShort:
    @pytest.mark.parametrize("frames", [2, 5, 15])
    def test_stretched_and_back(self, echo, free_body, frames):
        # Joints lie on chords between frames where rotations lie on arcs: equal up to that.
        rotations = motion(frames)
        result = refine(echo, free_body, features_of(rotations, free_body), betas(frames))
        assert_same(result, rotations, most=0.01)
        assert_same(result[[0, -1]], rotations[[0, -1]])

    def test_one_frame(self, echo, free_body):
        rotations = motion(7)[3:4]
        assert_same(refine(echo, free_body, features_of(rotations, free_body), betas(1)), rotations)


class TestGaps:
    def test_numbers_and_rotations_between_frames(self):
        valid = torch.tensor([False, True, False, False, True, False])
        values = torch.tensor([[9.0], [1], [9], [9], [4], [torch.nan]])
        assert fill_linear(values, valid)[:, 0].tolist() == [1, 1, 2, 3, 4, 4]
        turns = axis_angle_to_matrix(torch.tensor([0.0, 0, 0.1]) * values.nan_to_num())[:, None]
        filled = matrix_to_axis_angle(fill_rotations(turns, valid))[:, 0, 2]
        torch.testing.assert_close(filled, torch.tensor([0.1, 0.1, 0.2, 0.3, 0.4, 0.4]))

    def test_a_long_gap_splits(self):
        valid = torch.tensor([1, 1, 0, 0, 1, 0, 1, 0], dtype=torch.bool)
        assert parts(valid, 2) == [(0, 8)]
        assert parts(valid, 1) == [(0, 2), (4, 8)]
        assert parts(valid, 0) == [(0, 2), (4, 5), (6, 7)]

    @pytest.mark.parametrize("frames", [9, 40])
    def test_a_short_gap_is_bridged(self, echo, free_body, frames):
        rotations = motion(frames, speed=0.01)
        valid = torch.ones(frames, dtype=torch.bool)
        valid[[0, 4, 5, frames - 1]] = False
        features = features_of(rotations, free_body)
        features[~valid] = torch.nan  # whatever is there does not matter
        assert_same(refine(echo, free_body, features, betas(frames), valid), rotations, most=0.02)

    def test_a_long_gap_is_not_decoded_but_turned_through(self, echo, free_body):
        rotations = motion(60)
        valid = torch.ones(60, dtype=torch.bool)
        valid[20:40] = valid[55:] = False
        echo.calls = 0
        config = SequenceConfig(max_gap=4, overlap=0.25)
        result = refine(echo, free_body, features_of(rotations, free_body), betas(60), valid, config)
        assert echo.calls == 2 + 1  # 20 frames in two windows, and 15 stretched to one
        assert_same(result[:20], rotations[:20])
        assert_same(result[40:55], rotations[40:55], most=0.01)
        between = angle(result[19], result[40]) / 21
        torch.testing.assert_close(angle(result[19:40], result[20:41]), between.expand(21, -1), atol=2e-3, rtol=0)
        assert torch.equal(result[55:], result[54:55].expand(5, -1, -1, -1))


class TestStreaming:
    @pytest.mark.parametrize(("stride", "look_ahead"), [(1, 0), (4, 0), (1, 5), (4, 4), (6, 3), (3, 10), (8, 8)])
    @pytest.mark.parametrize("frames", [1, 7, 16, 45])
    def test_equals_the_same_windows_offline(self, echo, free_body, frames, stride, look_ahead):
        generator = torch.Generator().manual_seed(1)
        turns = torch.rand(frames, generator=generator)
        features = features_of(motion(frames), free_body, turns)
        stream = StreamingDecoder(echo, free_body, stride, look_ahead)
        result = torch.cat([stream.push(features, betas(frames)), stream.finish()])
        expected = offline(echo, free_body, features, stride, look_ahead)
        torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)

    @pytest.mark.parametrize("chunk", [1, 5, 100])
    def test_any_chunks_give_the_same_in_time(self, echo, free_body, chunk):
        frames = 50
        features = features_of(motion(frames), free_body, torch.linspace(0, 1, frames))
        stream = StreamingDecoder(echo, free_body, stride=4, look_ahead=5)
        assert stream.latency == 8
        got = []
        for first in range(0, frames, chunk):
            part = features[first : first + chunk]
            got.append(stream.push(part, betas(len(part))))
            returned = sum(map(len, got))
            assert first + len(part) - returned <= stream.latency
        got.append(stream.finish())
        torch.testing.assert_close(torch.cat(got), offline(echo, free_body, features, 4, 5), atol=1e-5, rtol=0)

    def test_look_ahead_takes_the_jump_out_of_the_border(self, echo, free_body):
        frames = 40
        turns = 0.5 * (torch.arange(frames) // 8 % 2)  # a window's first frame says how it is turned
        features = features_of(motion(1).expand(frames, -1, -1, -1), free_body, turns)
        largest = {}
        for look_ahead in (0, 8):
            stream = StreamingDecoder(echo, free_body, stride=8, look_ahead=look_ahead)
            result = torch.cat([stream.push(features, betas(frames)), stream.finish()])
            largest[look_ahead] = float(steps(result).max())
        assert largest[0] == pytest.approx(0.5, abs=5e-3)
        assert largest[8] < 0.5 * math.pi / 2 / 9 + 5e-3

    @pytest.mark.parametrize("gap", [3, 12, 20])
    def test_gaps_are_held_until_the_next_detection_and_then_bridged(self, echo, free_body, gap):
        frames = 50
        features = features_of(motion(frames, speed=0.02), free_body)
        valid = torch.ones(frames, dtype=torch.bool)
        valid[10 : 10 + gap] = False
        broken = features.masked_fill(~valid[:, None], torch.nan)
        stream = StreamingDecoder(echo, free_body, stride=2, look_ahead=10)
        result = torch.cat(
            [stream.push(broken[:30], betas(30), valid[:30]), stream.push(broken[30:], betas(20), valid[30:])]
        )
        result = torch.cat([result, stream.finish()])
        assert result.isfinite().all() and len(result) == frames
        if gap == 3:  # over before its frames are returned
            filled = fill_linear(broken, valid)
            torch.testing.assert_close(result, offline(echo, free_body, filled, 2, 10), atol=1e-5, rtol=0)
        assert_same(result[40:], motion(frames, speed=0.02)[40:])

    def test_a_new_sequence_after_the_end(self, echo, free_body):
        stream = StreamingDecoder(echo, free_body, stride=4, look_ahead=4)
        assert len(stream.finish()) == 0
        first = features_of(motion(30), free_body, 0.7)
        again = features_of(motion(10), free_body)
        stream.push(first, betas(30))
        stream.finish()
        result = torch.cat([stream.push(again, betas(10)), stream.finish()])
        torch.testing.assert_close(result, offline(echo, free_body, again, 4, 4), atol=1e-5, rtol=0)


def offline(echo, body, features: Tensor, stride: int, look_ahead: int) -> Tensor:
    """What streaming is to give, from all frames at once: each frame from the first window that returns it, blended
    with the window before over the frames that both know."""
    frames = len(features)
    ends = [*range(stride + look_ahead, frames + 1, stride)]
    decoded = {}
    for end in {*ends, frames}:
        first = max(0, end - WINDOW)
        decoded[end] = first, refine(echo, body, features[first:end], betas(end - first))
    result, done, before = [], 0, None
    for number, end in enumerate([*ends, frames]):
        last = frames if number == len(ends) else end - look_ahead
        first, window = decoded[end]
        shared = 0 if before is None else min(look_ahead, last - done)
        for place, frame in enumerate(range(done, last)):
            own = window[frame - first]
            if place < shared:
                share = math.sin(math.pi / 2 * (place + 1) / (shared + 1)) ** 2
                start, other = decoded[before]
                own = slerp(other[frame - start], own, torch.tensor(share))
            result.append(own)
        done, before = last, end
    return torch.stack(result)


class TestMistakes:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"overlap": 1.0}, r"overlap must be a share of the window in \[0, 1\), got 1.0"),
            ({"overlap": -0.1}, "overlap must be a share"),
            ({"max_gap": -1}, "max_gap must be a whole number of at least 0, got -1"),
            ({"steps": 0}, "steps must be a whole number of at least 1, got 0"),
            ({"batch": 1.5}, "batch must be a whole number of at least 1, got 1.5"),
        ],
    )
    def test_settings(self, settings, message):
        with pytest.raises(ValueError, match=message):
            SequenceConfig(**settings)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"stride": 0}, "stride must be a whole number of at least 1, got 0"),
            ({"look_ahead": -1}, "look_ahead must be a whole number of at least 0, got -1"),
            ({"stride": 9, "look_ahead": 8}, "at most the decoder's window of 16 frames, got 9 . 8"),
        ],
    )
    def test_streaming_settings(self, echo, free_body, settings, message):
        with pytest.raises(ValueError, match=message):
            StreamingDecoder(echo, free_body, **settings)

    def test_input(self, echo, free_body):
        features, everyone = features_of(motion(3), free_body), torch.ones(3, dtype=torch.bool)
        bad = features.clone()
        bad[1, 5] = torch.inf
        for arguments, message in (
            ((features[:, :9], betas(3)), r"features must be \(T, 134\) .* got \(3, 9\)"),
            ((features, betas(2)), r"betas must be \(3, 10\)"),
            ((features, betas(3), everyone[:2]), r"valid must be \(3,\) bool"),
            ((features, betas(3), ~everyone), "none of the 3 frames shows the person"),
            ((bad, betas(3)), r"features are not finite in frame 1 \(1 such frames\)"),
            ((features[:0], betas(0)), "none of the 0 frames"),
        ):
            with pytest.raises(ValueError, match=message):
                refine(echo, free_body, *arguments)
        with pytest.raises(ValueError, match="the first frame has no detection"):
            StreamingDecoder(echo, free_body).push(features, betas(3), torch.tensor([False, True, True]))

    def test_a_decoder_that_breaks(self, free_body):
        class Broken(Echo):
            def __call__(self, features, *, steps=1):
                return super().__call__(features, steps=steps) * torch.nan

        with pytest.raises(ValueError, match="poses that are not finite"):
            refine(Broken(free_body), free_body, features_of(motion(3), free_body), betas(3))


def test_all_lengths_and_gaps_give_rotations(echo, free_body):
    for frames, hole in itertools.product((1, 2, 16, 33), (0, 1)):
        features = features_of(motion(frames), free_body)
        valid = torch.ones(frames, dtype=torch.bool)
        valid[1:2] = not hole
        result = refine(echo, free_body, features, betas(frames), valid)
        torch.testing.assert_close(result @ result.mT, torch.eye(3).expand_as(result), atol=1e-4, rtol=0)
