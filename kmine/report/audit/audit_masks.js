/* Masks: COCO's compressed run lengths, pixels, outlines and canvases. Pure functions. */
"use strict";

const kmineAudit = {};

(() => {
  /* Run lengths in column order, zeros first. COCO's text has 5 bits per letter, and differences from the third run on. */
  function runs(text) {
    const lengths = [];
    for (let at = 0; at < text.length; ) {
      let value = 0;
      let bits = 0;
      let letter;
      do {
        letter = text.charCodeAt(at++) - 48;
        value |= (letter & 31) << bits;
        bits += 5;
      } while (letter & 32 && at < text.length);
      if (letter & 16 && bits < 32) value |= -1 << bits;
      if (lengths.length > 2) value += lengths[lengths.length - 2];
      lengths.push(value);
    }
    return lengths;
  }

  /* COCO's text of the pixels of `map` (height * width, row order) that are `value`: the inverse of `decode`. */
  function encode(map, value, height, width) {
    const lengths = [];
    let [inside, length] = [false, 0];
    for (let x = 0; x < width; x++) {
      for (let at = x; at < height * width; at += width) {
        if ((map[at] === value) !== inside) {
          lengths.push(length);
          length = 0;
          inside = !inside;
        }
        length += 1;
      }
    }
    lengths.push(length);
    let text = "";
    lengths.forEach((one, number) => {
      let rest = number > 2 ? one - lengths[number - 2] : one;
      let more = true;
      while (more) {
        const bits = rest & 31;
        rest >>= 5;
        more = bits & 16 ? rest !== -1 : rest !== 0;
        text += String.fromCharCode((more ? bits | 32 : bits) + 48);
      }
    });
    return text;
  }

  /* {pixels: Uint8Array (height * width, row order, 0 or 1), box: [x0, y0, x1, y1], ends inclusive, null if empty, area}. */
  function decode(text, height, width) {
    const pixels = new Uint8Array(height * width);
    let [x0, y0, x1, y1] = [width, height, -1, -1];
    let area = 0;
    let start = 0;
    runs(text).forEach((length, number) => {
      const end = Math.min(start + length, height * width);
      if (number % 2) {
        for (let at = start; at < end; at++) {
          const x = Math.floor(at / height);
          const y = at - x * height;
          pixels[y * width + x] = 1;
          if (x < x0) x0 = x;
          if (x > x1) x1 = x;
          if (y < y0) y0 = y;
          if (y > y1) y1 = y;
        }
        area += Math.max(0, end - start);
      }
      start = end;
    });
    return { pixels, height, width, area, box: area ? [x0, y0, x1, y1] : null };
  }

  /* A small nearest-neighbour copy directly from the run lengths, so that lists decode no full masks. */
  function sample(text, height, width, smallHeight, smallWidth) {
    const pixels = new Uint8Array(smallHeight * smallWidth);
    const lengths = runs(text);
    let number = 0;
    let end = lengths.length ? lengths[0] : 0;
    for (let x = 0; x < smallWidth; x++) {
      const column = Math.floor(((x + 0.5) * width) / smallWidth) * height;
      for (let y = 0; y < smallHeight; y++) {
        const at = column + Math.floor(((y + 0.5) * height) / smallHeight);
        while (at >= end && number + 1 < lengths.length) end += lengths[++number];
        pixels[y * smallWidth + x] = at < end && number % 2 ? 1 : 0;
      }
    }
    return { pixels, height: smallHeight, width: smallWidth };
  }

  /* A canvas of the mask's size: colour [r, g, b] inside, transparent outside; striped for ignored pixels. */
  function paint(mask, colour, striped = false) {
    const canvas = document.createElement("canvas");
    canvas.width = mask.width;
    canvas.height = mask.height;
    const context = canvas.getContext("2d");
    const image = context.createImageData(mask.width, mask.height);
    const [r, g, b] = colour;
    const data = image.data;
    for (let at = 0; at < mask.pixels.length; at++) {
      if (!mask.pixels[at]) continue;
      if (striped && ((at % mask.width) + Math.floor(at / mask.width)) % 8 > 3) continue;
      data[4 * at] = r;
      data[4 * at + 1] = g;
      data[4 * at + 2] = b;
      data[4 * at + 3] = 255;
    }
    context.putImageData(image, 0, 0);
    return canvas;
  }

  /* The border between pixels as closed loops of corners [[x, y] ...], with the mask on the right. */
  function outline(mask) {
    if (!mask.box) return [];
    const { pixels, width, height } = mask;
    const inside = (x, y) => x >= 0 && y >= 0 && x < width && y < height && pixels[y * width + x] === 1;
    const wide = width + 1;
    const next = new Map(); // corner -> end corners of its edges
    const edge = (xa, ya, xb, yb) => {
      const from = ya * wide + xa;
      const found = next.get(from);
      if (found) found.push(yb * wide + xb);
      else next.set(from, [yb * wide + xb]);
    };
    const [x0, y0, x1, y1] = mask.box;
    for (let y = y0; y <= y1; y++) {
      for (let x = x0; x <= x1; x++) {
        if (!inside(x, y)) continue;
        if (!inside(x, y - 1)) edge(x, y, x + 1, y);
        if (!inside(x + 1, y)) edge(x + 1, y, x + 1, y + 1);
        if (!inside(x, y + 1)) edge(x + 1, y + 1, x, y + 1);
        if (!inside(x - 1, y)) edge(x, y + 1, x, y);
      }
    }
    const loops = [];
    for (const [start, ends] of next) {
      while (ends.length) {
        const loop = [];
        let at = start;
        let before = 0;
        do {
          const to = next.get(at).pop();
          // Skip corners on a straight line.
          if (to - at !== before) loop.push([at % wide, Math.floor(at / wide)]);
          before = to - at;
          at = to;
        } while (at !== start);
        loops.push(loop);
      }
    }
    return loops;
  }

  /* The outline as a Path2D. */
  function path(mask) {
    const found = new Path2D();
    for (const loop of outline(mask)) {
      loop.forEach(([x, y], number) => (number ? found.lineTo(x, y) : found.moveTo(x, y)));
      found.closePath();
    }
    return found;
  }

  kmineAudit.masks = { runs, encode, decode, sample, paint, outline, path };
})();
