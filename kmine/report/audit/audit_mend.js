/* The brush: changes the mask under review in place, stroke by stroke. */
"use strict";

(() => {
  const { masks, view } = kmineAudit;
  const IGNORED = 255;
  const SIZES = [1, 2, 3, 5, 8, 12, 18, 27, 40, 60, 90, 140]; // diameters in pixels of the image

  const mend = { active: false, size: 4, classId: 1, erasing: false };
  let map = null; // class ids of the mask under review, in row order
  let original = null;
  let item = null;
  let live = null; // canvas of the map while a stroke is drawn
  let cursor = null; // [x, y] in the image
  let stroke = null; // last place of the stroke, or null
  let done = () => {};

  /* `onStroke(item, layers or null)` is called after each stroke, with null if the mask is the original again. */
  function start(onStroke) {
    done = onStroke;
    view.brush = { isOn: () => mend.active, down, move, up, draw };
  }

  const compose = (one, layers) => {
    const composed = new Uint8Array(one.height * one.width);
    for (const [classId, text] of layers) {
      const { pixels } = masks.decode(text, one.height, one.width);
      for (let at = 0; at < pixels.length; at++) if (pixels[at]) composed[at] = classId;
    }
    return composed;
  };

  /* Begin with the mask as the run has it and as it was changed so far: [[class, run lengths] ...] or null. */
  function open(one, given, changed) {
    item = one;
    mend.given = given;
    original = compose(one, given);
    map = changed ? compose(one, changed) : original.slice();
    cursor = cursor ?? [one.width / 2, one.height / 2];
    mend.active = true;
    view.draw();
  }

  function close() {
    [mend.active, map, live, stroke, cursor] = [false, null, null, null, null];
    view.draw();
  }

  /* Set the disc about (x, y), and the way there, to the class. */
  function paint([x0, y0], [x1, y1]) {
    const radius = SIZES[mend.size] / 2;
    const value = mend.erasing ? 0 : mend.classId;
    const steps = Math.max(1, Math.ceil(Math.hypot(x1 - x0, y1 - y0) / Math.max(0.5, radius / 2)));
    for (let step = 0; step <= steps; step++) {
      const [x, y] = [x0 + ((x1 - x0) * step) / steps, y0 + ((y1 - y0) * step) / steps];
      for (let row = Math.max(0, Math.floor(y - radius)); row <= Math.min(item.height - 1, Math.floor(y + radius)); row++) {
        for (let column = Math.max(0, Math.floor(x - radius)); column <= Math.min(item.width - 1, Math.floor(x + radius)); column++) {
          const own = Math.floor(x) === column && Math.floor(y) === row; // the smallest brush sets one pixel
          if (own || Math.hypot(column + 0.5 - x, row + 0.5 - y) < radius) map[row * item.width + column] = value;
        }
      }
    }
    refresh();
  }

  function refresh() {
    if (!live) {
      live = document.createElement("canvas");
      [live.width, live.height] = [item.width, item.height];
    }
    const context = live.getContext("2d");
    const image = context.createImageData(item.width, item.height);
    const colours = [view.COLOURS[view.own(item)], view.COLOURS.ignored];
    for (let at = 0; at < map.length; at++) {
      if (map[at]) image.data.set([...colours[Number(map[at] === IGNORED)], 255], 4 * at);
    }
    context.putImageData(image, 0, 0);
    view.draw();
  }

  const layers = (from) => [...new Set(from)].filter((value) => value).sort((a, b) => a - b)
    .map((value) => [value, masks.encode(from, value, item.height, item.width)]);

  function finish() {
    [stroke, live] = [null, null];
    done(item, map.every((value, at) => value === original[at]) ? null : layers(map));
  }

  /* Pointer: places in pixels of the image. */
  function down(place) {
    if (!mend.active) return false;
    stroke = cursor = place;
    paint(place, place);
    return true;
  }

  function move(place) {
    if (!mend.active) return;
    cursor = place;
    if (!stroke) return void view.draw();
    paint(stroke, place);
    stroke = place;
  }

  function up() {
    if (stroke) finish();
  }

  /* Keyboard: move the brush by half of itself, set its disc. */
  function nudge(dx, dy) {
    const step = Math.max(1, SIZES[mend.size] / 2);
    cursor = [
      Math.min(item.width - 0.5, Math.max(0.5, cursor[0] + dx * step)),
      Math.min(item.height - 0.5, Math.max(0.5, cursor[1] + dy * step)),
    ];
    view.draw();
  }

  function dab() {
    paint(cursor, cursor);
    finish();
  }

  function resize(by) {
    mend.size = Math.min(SIZES.length - 1, Math.max(0, mend.size + by));
    view.draw();
  }

  /* Draw the stroke under way, and the brush. Returns whether the mask under review is drawn here. */
  function draw(context) {
    if (!mend.active) return false;
    if (live) {
      context.globalAlpha = Math.max(0.45, view.opacity);
      context.drawImage(live, 0, 0);
      context.globalAlpha = 1;
    }
    if (cursor) {
      const ring = new Path2D();
      ring.arc(cursor[0], cursor[1], SIZES[mend.size] / 2, 0, 2 * Math.PI);
      view.stroke(context, ring, "#ffffff", 1.5, mend.erasing ? [4, 3] : []);
    }
    return Boolean(live);
  }

  kmineAudit.mend = Object.assign(mend, { start, open, close, nudge, dab, resize, SIZES });
})();
