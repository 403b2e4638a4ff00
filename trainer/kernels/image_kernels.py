"""Triton kernels that make a batch: gather, flip, shift and resize; gather and warp; colours; normalise.

The samples of a step are slices of an epoch's, at any multiple of 4 or 8 bytes. The kernels are therefore compiled for
any alignment of these: else the capture of a CUDA graph might be the first to need another variant, and cannot compile.

No argument is called `params`: Triton has a variable of its own of that name where it looks at a kernel's arguments.
"""
# mypy: ignore-errors
# ruff: noqa: PLR0913

import triton
import triton.language as tl


@triton.jit
def _place(i, size, is_mirrored, shift, FILL: tl.constexpr):
    """Returns where pixels of an axis come from, and whether that is inside of the image."""
    i = tl.where(is_mirrored > 0, size - 1 - i, i) + shift
    is_inside = (i >= 0) & (i < size)
    if FILL == "reflect":
        i = tl.where(i < 0, -i, i)
        i = tl.where(i >= size, 2 * (size - 1) - i, i)
        is_inside = i >= 0
    return i, is_inside


@triton.jit
def _pixel(image, c, y, x, height, width, mirrored, upside_down, dx, dy, mask, FILL: tl.constexpr):
    x, is_x_inside = _place(x, width, mirrored, dx, FILL)
    y, is_y_inside = _place(y, height, upside_down, dy, FILL)
    return tl.load(image + (c * height + y) * width + x, mask=mask & is_x_inside & is_y_inside, other=0)


@triton.jit(do_not_specialize_on_alignment=["indices", "drawn", "upside_down"])
def gather_and_shift(images, indices, drawn, upside_down, out, num_drawn, channels, height, width, out_height,
                     out_width, RESIZE: tl.constexpr, UPSIDE_DOWN: tl.constexpr, FILL: tl.constexpr,
                     BLOCK: tl.constexpr):  # fmt: skip
    """Writes the images of a batch, flipped, then shifted, then resized; grid (images, blocks of an output image).

    `drawn` are rows of (mirrored, dx, dy, …), as `draw_params` makes them. The resize is `F.interpolate`'s, bilinear.
    """
    number = tl.program_id(0)
    image = images + tl.load(indices + number).to(tl.int64) * (channels * height * width)
    row = drawn + number * num_drawn
    mirrored, dx, dy = tl.load(row), tl.load(row + 1).to(tl.int32), tl.load(row + 2).to(tl.int32)
    down = 0.0
    if UPSIDE_DOWN:
        down = tl.load(upside_down + number * num_drawn)
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    out_size = channels * out_height * out_width
    mask = e < out_size
    line = e // out_width
    x, c = e - line * out_width, line // out_height
    y = line - c * out_height
    to = out + number.to(tl.int64) * out_size + e
    if RESIZE:
        from_y = tl.maximum((y + 0.5) * (height / out_height) - 0.5, 0.0)
        from_x = tl.maximum((x + 0.5) * (width / out_width) - 0.5, 0.0)
        y0, x0 = from_y.to(tl.int32), from_x.to(tl.int32)
        y1, x1 = tl.minimum(y0 + 1, height - 1), tl.minimum(x0 + 1, width - 1)
        b, a = from_y - y0, from_x - x0
        upper_left = _pixel(image, c, y0, x0, height, width, mirrored, down, dx, dy, mask, FILL).to(tl.float32)
        upper_right = _pixel(image, c, y0, x1, height, width, mirrored, down, dx, dy, mask, FILL).to(tl.float32)
        lower_left = _pixel(image, c, y1, x0, height, width, mirrored, down, dx, dy, mask, FILL).to(tl.float32)
        lower_right = _pixel(image, c, y1, x1, height, width, mirrored, down, dx, dy, mask, FILL).to(tl.float32)
        upper = (1 - a) * upper_left + a * upper_right
        tl.store(to, (1 - b) * upper + b * ((1 - a) * lower_left + a * lower_right), mask=mask)
    else:
        tl.store(to, _pixel(image, c, y, x, height, width, mirrored, down, dx, dy, mask, FILL), mask=mask)


@triton.jit
def _inside(image, c, y, x, height, width, mask):
    is_inside = mask & (y >= 0) & (y < height) & (x >= 0) & (x < width)
    return tl.load(image + (c * height + y) * width + x, mask=is_inside, other=0).to(tl.float32)


@triton.jit(do_not_specialize_on_alignment=["indices", "drawn", "upside_down"])
def gather_and_warp(images, indices, drawn, upside_down, out, num_drawn, channels, height, width,
                    UPSIDE_DOWN: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Writes the images of a batch flipped, shifted, rotated and scaled; grid (images, blocks of an output image).

    `drawn` are rows of (mirrored, dx, dy, angle, scale x, scale y), as `draw_params` makes them. The positions are
    those of `F.affine_grid`, the interpolation `F.grid_sample`'s, bilinear, with 0 outside.
    """
    number = tl.program_id(0)
    image = images + tl.load(indices + number).to(tl.int64) * (channels * height * width)
    row = drawn + number * num_drawn
    angle, scale_x, scale_y = tl.load(row + 3), tl.load(row + 4), tl.load(row + 5)
    cos, sin = tl.cos(angle), tl.sin(angle)
    sign_x, sign_y = 1.0 - 2.0 * tl.load(row), 1.0
    if UPSIDE_DOWN:
        sign_y = 1.0 - 2.0 * tl.load(upside_down + number * num_drawn)
    shift_x, shift_y = 2.0 * tl.load(row + 1) / width, 2.0 * tl.load(row + 2) / height
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    out_size = channels * height * width
    mask = e < out_size
    line = e // width
    x, c = e - line * width, line // height
    y = line - c * height
    across = (2.0 * x + 1.0) / width - 1.0
    down = (2.0 * y + 1.0) / height - 1.0
    from_x = sign_x * cos / scale_x * across - sin / scale_x * sign_y * down + shift_x
    from_y = sign_x * sin / scale_y * across + cos / scale_y * sign_y * down + shift_y
    from_x = ((from_x + 1.0) * width - 1.0) * 0.5
    from_y = ((from_y + 1.0) * height - 1.0) * 0.5
    left, top = tl.floor(from_x), tl.floor(from_y)
    a, b = from_x - left, from_y - top
    x0, y0 = left.to(tl.int32), top.to(tl.int32)
    value = (1 - a) * (1 - b) * _inside(image, c, y0, x0, height, width, mask)
    value += a * (1 - b) * _inside(image, c, y0, x0 + 1, height, width, mask)
    value += (1 - a) * b * _inside(image, c, y0 + 1, x0, height, width, mask)
    value += a * b * _inside(image, c, y0 + 1, x0 + 1, height, width, mask)
    tl.store(out + number.to(tl.int64) * out_size + e, value, mask=mask)


@triton.jit
def normalize(pixels, mean, deviation, out, rows, size, CHANNELS: tl.constexpr, BC: tl.constexpr,
              BM: tl.constexpr):  # fmt: skip
    """Writes (pixels - mean) / deviation, channels last; grid (row blocks).

    `pixels` are [B, CHANNELS, size], in 0..255; `rows` is B times size, BC a power of two from CHANNELS on.
    """
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    c = tl.arange(0, BC)
    image = m // size
    at = (image * CHANNELS * size + (m - image * size))[:, None] + c[None, :] * size
    mask = (m < rows)[:, None] & (c < CHANNELS)[None, :]
    value = tl.load(pixels + at, mask=mask, other=0).to(tl.float32)
    centre = tl.load(mean + c, mask=c < CHANNELS, other=0.0)
    scale = tl.load(deviation + c, mask=c < CHANNELS, other=1.0)
    value = tl.math.div_rn(value - centre[None, :], tl.zeros_like(value) + scale[None, :])
    tl.store(out + m[:, None] * CHANNELS + c[None, :], value, mask=mask)


@triton.jit
def _bright(image, pixel, size, mask, brightness, CHANNELS: tl.constexpr, BRIGHTNESS: tl.constexpr):
    """Returns red, green and blue after the change of brightness; three times the grey of an image without colours."""
    red = tl.load(image + pixel, mask=mask, other=0).to(tl.float32)
    green, blue = red, red
    if CHANNELS == 3:
        green = tl.load(image + size + pixel, mask=mask, other=0).to(tl.float32)
        blue = tl.load(image + 2 * size + pixel, mask=mask, other=0).to(tl.float32)
    if BRIGHTNESS:
        red, green, blue = _clamp(red * brightness), _clamp(green * brightness), _clamp(blue * brightness)
    return red, green, blue


@triton.jit
def _clamp(value):
    return tl.minimum(tl.maximum(value, 0.0), 255.0)


@triton.jit
def _grey(red, green, blue, CHANNELS: tl.constexpr):
    if CHANNELS == 3:
        red = 0.2989 * red + 0.587 * green + 0.114 * blue
    return red


@triton.jit(do_not_specialize_on_alignment=["drawn"])
def jitter(images, drawn, out, num_drawn, size, CHANNELS: tl.constexpr, BRIGHTNESS: tl.constexpr,
           CONTRAST: tl.constexpr, SATURATION: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Changes brightness, then contrast, then saturation, as `augment.colour` does; grid (images).

    `drawn` are rows of the three factors, `images` [B, CHANNELS, size] with 1 or 3 channels.
    """
    number = tl.program_id(0)
    image = images + number.to(tl.int64) * (CHANNELS * size)
    to = out + number.to(tl.int64) * (CHANNELS * size)
    row = drawn + number * num_drawn
    brightness, contrast, saturation = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    mean = 0.0 * contrast
    if CONTRAST:
        total = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, size, BLOCK):
            pixel = start + tl.arange(0, BLOCK)
            red, green, blue = _bright(image, pixel, size, pixel < size, brightness, CHANNELS, BRIGHTNESS)
            total += tl.where(pixel < size, _grey(red, green, blue, CHANNELS), 0.0)
        mean = tl.sum(total, 0) / size
    for start in range(0, size, BLOCK):
        pixel = start + tl.arange(0, BLOCK)
        mask = pixel < size
        red, green, blue = _bright(image, pixel, size, mask, brightness, CHANNELS, BRIGHTNESS)
        if CONTRAST:
            red = _clamp(mean + contrast * (red - mean))
            green = _clamp(mean + contrast * (green - mean))
            blue = _clamp(mean + contrast * (blue - mean))
        if SATURATION and CHANNELS == 3:
            grey = _grey(red, green, blue, CHANNELS)
            red = _clamp(grey + saturation * (red - grey))
            green = _clamp(grey + saturation * (green - grey))
            blue = _clamp(grey + saturation * (blue - grey))
        tl.store(to + pixel, red, mask=mask)
        if CHANNELS == 3:
            tl.store(to + size + pixel, green, mask=mask)
            tl.store(to + 2 * size + pixel, blue, mask=mask)
