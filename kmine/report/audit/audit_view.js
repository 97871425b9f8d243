/* The image with its layers: zoom, pan, visible layers. */
"use strict";

(() => {
  const { masks } = kmineAudit;

  /* Hues that tissue lacks; every line has a dark casing, so that it is seen on bright ground as well. The mask under
     review is cyan, what it is compared with lime. */
  const COLOURS = {
    prompts: [255, 255, 255],
    local: [166, 150, 255],
    segmenter: [255, 90, 255],
    pseudo: [0, 229, 255],
    withheld: [255, 240, 70],
    given: [0, 229, 255],
    model: [166, 255, 60],
    ignored: [170, 170, 170],
  };
  /* In the order of the keys 1 to 9. Layers that would bias the reviewer start hidden. */
  const LAYERS = [
    ["image", "image", true, "the image"],
    ["prompts", "prompts", false, "prompts of the segmenter"],
    ["local", "local", false, "mask of the local model, the source of the prompts"],
    ["segmenter", "segmenter", false, "mask of the segmenter"],
    ["pseudo", "pseudo", true, "pseudo mask used in training"],
    ["withheld", "withheld", false, "the true mask, withheld from training"],
    ["given", "given", true, "the given mask"],
    ["model", "model", true, "prediction of models not trained on this mask"],
    ["ignored", "ignored", true, "pixels ignored in training"],
  ];
  const DASHES = [[], [7, 4], [2, 4], [10, 3, 2, 3]]; // by class: 1, 2, 3, 4 and so on in turn
  const IGNORED = 255;
  const own = (item) => (item.kind === "labeled" ? "given" : "pseudo"); // the layer under review
  const css = (colour) => `rgb(${colour.join(" ")})`;

  const view = {
    on: new Map(LAYERS.map(([name, , on]) => [name, on])),
    opacity: 0.35,
    filled: true,
    scale: 1,
    x: 0,
    y: 0,
    fitted: true,
    item: null,
    layers: [],
    prompts: [],
    brush: { isOn: () => false, down: () => false, move: () => {}, up: () => {}, draw: () => false },
  };
  let stage, picture, canvas, failed;
  let frame = 0;
  const ready = { pictured: false, filled: false };

  function start() {
    stage = document.getElementById("stage");
    picture = document.getElementById("picture");
    canvas = document.getElementById("overlay");
    failed = document.getElementById("failed");
    picture.addEventListener("error", () => {
      failed.hidden = !view.item;
      if (view.item) failed.textContent = `The image cannot be shown: ${view.item.picture}`;
      settle({ pictured: true });
    });
    picture.addEventListener("load", () => {
      picture.style.visibility = "visible";
      settle({ pictured: true });
    });
    new ResizeObserver(() => (view.fitted ? fit() : draw())).observe(stage); // the brush's tools change its height
    listen();
  }

  /* Show another mask: its image at once, its layers when they are loaded. */
  function show(item) {
    view.item = item;
    view.layers = [];
    view.prompts = [];
    picture.alt = item ? `Image of ${item.id}` : "";
    if (item) picture.src = item.picture;
    else picture.removeAttribute("src");
    // Browsers show the old image until the new one is loaded: hide it, so that no mask lies on another image.
    picture.style.visibility = "hidden";
    failed.hidden = true;
    stage.dataset.shown = "";
    Object.assign(ready, { pictured: false, filled: false });
    fit();
  }

  /* `data-shown` holds the key of the mask once its image and layers are on the screen. */
  function settle(change) {
    Object.assign(ready, change);
    const { item } = view;
    if (!item || !ready.pictured || !ready.filled) return;
    requestAnimationFrame(() => {
      if (view.item === item) stage.dataset.shown = item.key;
    });
  }

  /* `layers` are [name, class, run lengths], decoded when first drawn. */
  function fill(item, layers, prompts) {
    if (view.item !== item) return;
    view.layers = layers.map(([name, classId, text]) => {
      const kind = classId === IGNORED ? "ignored" : name;
      return { name, kind, classId, text, mask: null, canvas: null, path: null };
    });
    view.prompts = prompts;
    draw();
    settle({ filled: true });
  }

  function fit() {
    view.fitted = true;
    if (!view.item) return draw();
    const { width, height } = view.item;
    view.scale = Math.min(stage.clientWidth / width, stage.clientHeight / height) || 1;
    view.x = (stage.clientWidth - width * view.scale) / 2;
    view.y = (stage.clientHeight - height * view.scale) / 2;
    return draw();
  }

  /* Zoom about a fixed point of the stage. */
  function zoom(factor, x = stage.clientWidth / 2, y = stage.clientHeight / 2) {
    const scale = Math.min(64, Math.max(0.02, view.scale * factor));
    view.x = x - ((x - view.x) * scale) / view.scale;
    view.y = y - ((y - view.y) * scale) / view.scale;
    view.scale = scale;
    view.fitted = false;
    draw();
  }

  function pan(dx, dy) {
    view.fitted = false;
    view.x += dx;
    view.y += dy;
    draw();
  }

  function toggle(name) {
    view.on.set(name, !view.on.get(name));
    draw();
    return view.on.get(name);
  }

  function draw() {
    if (!frame) frame = requestAnimationFrame(paint);
  }

  function paint() {
    frame = 0;
    const ratio = window.devicePixelRatio || 1;
    const [width, height] = [Math.round(stage.clientWidth * ratio), Math.round(stage.clientHeight * ratio)];
    if (canvas.width !== width || canvas.height !== height) [canvas.width, canvas.height] = [width, height];
    const context = canvas.getContext("2d");
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, width, height);
    picture.hidden = !view.item || !view.on.get("image");
    if (!view.item) return;
    picture.style.width = `${view.item.width}px`;
    picture.style.height = `${view.item.height}px`;
    picture.style.transform = `translate(${view.x}px, ${view.y}px) scale(${view.scale})`;
    picture.style.imageRendering = view.scale >= 3 ? "pixelated" : "auto";
    context.setTransform(ratio * view.scale, 0, 0, ratio * view.scale, ratio * view.x, ratio * view.y);
    context.imageSmoothingEnabled = false;
    const drawn = view.brush.draw(context);
    const shown = view.layers.filter(
      ({ name, kind }) => view.on.get(name) && view.on.get(kind) && !(drawn && name === own(view.item)),
    );
    for (const layer of shown) paintInside(context, layer);
    for (const layer of shown) paintOutline(context, layer);
    if (view.on.get("prompts")) for (const prompt of view.prompts) paintPrompt(context, prompt);
  }

  function maskOf(layer) {
    layer.mask = layer.mask || masks.decode(layer.text, view.item.height, view.item.width);
    return layer.mask;
  }

  function paintInside(context, layer) {
    const ignored = layer.kind === "ignored";
    if (!view.filled && !ignored) return;
    layer.canvas = layer.canvas || masks.paint(maskOf(layer), COLOURS[layer.kind], ignored);
    context.globalAlpha = view.opacity;
    context.drawImage(layer.canvas, 0, 0);
    context.globalAlpha = 1;
  }

  function paintOutline(context, layer) {
    if (layer.kind === "ignored") return;
    layer.path = layer.path || masks.path(maskOf(layer));
    stroke(context, layer.path, css(COLOURS[layer.kind]), 2, DASHES[(layer.classId + 3) % 4]);
  }

  /* A line of `width` screen pixels at any zoom, over a darker one for contrast. */
  function stroke(context, path, colour, width, dashes) {
    context.lineJoin = "round";
    context.setLineDash([]);
    context.strokeStyle = "rgb(0 0 0 / 80%)";
    context.lineWidth = (width + 2.5) / view.scale;
    context.stroke(path);
    context.setLineDash(dashes.map((length) => length / view.scale));
    context.strokeStyle = colour;
    context.lineWidth = width / view.scale;
    context.stroke(path);
    context.setLineDash([]);
  }

  /* Boxes include both ends. Thick: the prompt; thin: its jittered copies; discs: positive points; crosses: negative. */
  function paintPrompt(context, [classId, box, points, jittered]) {
    const white = css(COLOURS.prompts);
    const rectangle = ([x0, y0, x1, y1]) => {
      const path = new Path2D();
      path.rect(x0, y0, x1 - x0 + 1, y1 - y0 + 1);
      return path;
    };
    for (const one of jittered) stroke(context, rectangle(one), white, 0.6, []);
    if (box) stroke(context, rectangle(box), white, 2.5, DASHES[(classId + 3) % 4]);
    const size = 6 / view.scale;
    for (const [x, y, label] of points) {
      const path = new Path2D();
      const [u, v] = [x + 0.5, y + 0.5];
      if (label) path.arc(u, v, size, 0, 2 * Math.PI);
      for (const [du, dv] of label ? [] : [[size, size], [size, -size]]) {
        path.moveTo(u - du, v - dv);
        path.lineTo(u + du, v + dv);
      }
      stroke(context, path, white, 2.5, []);
      if (label) {
        context.fillStyle = white;
        context.fill(path);
      }
    }
  }

  /* Wheel and two fingers zoom, one finger or the mouse pans (or paints; with Shift it always pans), a double click fits. */
  function listen() {
    const touching = new Map();
    const place = (event) => {
      const box = stage.getBoundingClientRect();
      return [event.clientX - box.left, event.clientY - box.top];
    };
    stage.addEventListener("wheel", (event) => {
      event.preventDefault();
      zoom(Math.exp(-Math.max(-240, Math.min(240, event.deltaY)) / 400), ...place(event));
    }, { passive: false });
    const pixel = ([x, y]) => [(x - view.x) / view.scale, (y - view.y) / view.scale];
    let painting = false;
    stage.addEventListener("dblclick", () => view.brush.isOn() || fit());
    stage.addEventListener("pointerdown", (event) => {
      touching.set(event.pointerId, place(event));
      stage.setPointerCapture(event.pointerId);
      if (touching.size > 1) view.brush.up();
      painting = touching.size === 1 && !event.shiftKey && event.button === 0 && view.brush.down(pixel(place(event)));
    });
    stage.addEventListener("pointermove", (event) => {
      const before = touching.get(event.pointerId);
      const now = place(event);
      if (!before) return void view.brush.move(pixel(now));
      if (painting && touching.size === 1) {
        touching.set(event.pointerId, now);
        return void view.brush.move(pixel(now));
      }
      const other = [...touching].find(([id]) => id !== event.pointerId);
      touching.set(event.pointerId, now);
      if (!other) return void pan(now[0] - before[0], now[1] - before[1]);
      const far = ([x, y]) => Math.hypot(x - other[1][0], y - other[1][1]) || 1;
      zoom(far(now) / far(before), ...other[1]);
    });
    for (const name of ["pointerup", "pointercancel"]) {
      stage.addEventListener(name, (event) => {
        touching.delete(event.pointerId);
        if (painting) view.brush.up();
        painting = false;
      });
    }
  }

  kmineAudit.view = Object.assign(view, { start, show, fill, fit, zoom, pan, toggle, draw, stroke, own, LAYERS, COLOURS, css });
})();
