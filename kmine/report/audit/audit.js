/* The page: loads the data files, fills the panel, handles keys and buttons. */
"use strict";

(() => {
  const { view, list, verdicts, filter, mend } = kmineAudit;
  const FACTS = 9; // where the facts of an index row begin
  kmineAudit.FACTS = FACTS;
  const DETAILS_HELD = 60; // files of run lengths kept in memory
  const $ = (id) => document.getElementById(id);
  const page = JSON.parse($("page").textContent);
  const byKey = new Map();
  const facts = new Map(); // name -> distinct values, up to the size of a menu
  let keysOn = true;

  /* Data: each file is a script that calls `take`. */
  const taken = new Map();
  kmineAudit.take = (what, number, value) => taken.set(`${what}_${number}`, value);

  function load(what, number) {
    const name = `${what}_${number}`;
    return new Promise((resolve, reject) => {
      const script = document.createElement("script");
      script.src = `${document.body.dataset.folder}/${name}.js`;
      script.onload = () => {
        script.remove();
        const value = taken.get(name);
        taken.delete(name);
        if (value === undefined) reject(new Error(`${name}.js is damaged: run the audit again`));
        else resolve(value);
      };
      script.onerror = () => {
        script.remove();
        reject(new Error(`${document.body.dataset.folder}/${name}.js cannot be read: keep the folder beside the page`));
      };
      document.head.append(script);
    });
  }

  const held = new Map(); // file number -> promise of its rows, most recently used last
  function details(item) {
    const number = Math.floor(item.number / page.detail_rows);
    const found = held.get(number) || load("masks", number);
    held.delete(number);
    held.set(number, found);
    found.catch(() => held.delete(number));
    if (held.size > DETAILS_HELD) held.delete(held.keys().next().value);
    return found.then((rows) => {
      const row = rows[item.number % page.detail_rows];
      if (row && row[0] === item.id && row[1] === item.kind && row[2] === item.signature) return row;
      throw new Error("the audit was run again since this page was opened: reload it");
    });
  }

  function take(chunk) {
    const columns = new Map(chunk.facts.map((name, at) => [name, FACTS + at]));
    for (const row of chunk.rows) {
      const [id, kind, rank, suspicion, causes, picture, height, width, signature] = row;
      const number = list.items.length;
      const key = verdicts.key(kind, id);
      const item = { number, key, id, kind, rank, suspicion, causes, picture, height, width, signature, columns, row };
      list.items.push(item);
      byKey.set(key, item);
    }
    for (const [name, at] of columns) {
      if (!facts.has(name)) facts.set(name, new Set());
      const values = facts.get(name);
      for (const row of chunk.rows) if (values.size <= 40 && row[at] !== null) values.add(row[at]);
    }
  }

  async function start() {
    view.start();
    list.start();
    Object.assign(list, { pick, details, verdictOf: verdicts.state });
    verdicts.start(page, () => {
      list.refreshAll();
      progress();
      if (item()) showVerdict(item());
    });
    buttons();
    if (!verdicts.works) announce("This browser stores nothing for this page: save the verdicts before leaving.");
    let last = -Infinity;
    for (let number = 0; number < page.index_files; number++) {
      take(await load("index", number));
      if (number === 0 || number === page.index_files - 1 || performance.now() - last > 1000) {
        choose();
        last = performance.now();
      }
      if (number === 0) pick(0);
    }
    filter.menus();
    for (const name of facts.keys()) $("sort").append(new Option(written(name), `fact:${name}`));
    choose();
    const remembered = byKey.get(verdicts.at);
    const place = list.shown.indexOf(remembered);
    if (list.at <= 0 && place >= 0) pick(place);
    $("panel").hidden = !item();
    if (!page.count) announce("The run has no masks to review.");
    document.body.dataset.ready = "yes";
  }

  /* One mask. */
  const item = () => list.shown[list.at];

  function pick(place) {
    if (place < 0 || place >= list.shown.length) {
      if (list.shown.length) announce(place < 0 ? "This is the first one of the list." : "This is the last one of the list.");
      return void progress();
    }
    list.select(place);
    const one = item();
    if (mend.active) mending(false);
    verdicts.place(one);
    view.show(one);
    panel(one);
    progress();
    details(one).then(([, , , layers, prompts, history]) => {
      if (item() !== one) return;
      view.fill(one, reviewed(one, layers), prompts);
      fill($("history"), history.map((line) => element("li", line)));
      const present = new Set(layers.flatMap(([name, classId]) => (classId === 255 ? [name, "ignored"] : [name])));
      if (prompts.length) present.add("prompts");
      present.add("image");
      for (const button of $("layers").children) button.classList.toggle("absent", !present.has(button.dataset.layer));
      $("classes").hidden = !layers.some(([, classId]) => classId > 1 && classId !== 255);
      ahead(place + 1);
    }, (error) => item() === one && announce(`Masks cannot be shown: ${error.message}`));
  }

  /* The layers with the mask under review as the reviewer has mended it. */
  function reviewed(one, layers) {
    const mended = verdicts.get(one)?.mended;
    if (!mended) return layers;
    return [...layers.filter(([name]) => name !== view.own(one)), ...mended.map((layer) => [view.own(one), ...layer])];
  }

  const refill = (one) => details(one).then(([, , , layers, prompts]) => view.fill(one, reviewed(one, layers), prompts), () => {});

  /* Switch the brush on or off; the stage stays as it is. */
  function mending(on) {
    const one = item();
    if (!one || on === mend.active) return;
    if (on) {
      details(one).then(([, , , layers]) => {
        if (item() !== one) return;
        const given = layers.filter(([name]) => name === view.own(one)).map(([, classId, text]) => [classId, text]);
        mend.open(one, given, verdicts.get(one)?.mended);
        if (!view.on.get(view.own(one))) layer(view.LAYERS.findIndex(([name]) => name === view.own(one)));
        announce("Drag to paint, x erases, comma and full stop size the brush, Shift and drag pans; m ends it.");
        tools();
      }, (error) => announce(`The mask cannot be mended: ${error.message}`));
    } else mend.close();
    tools();
  }

  function tools() {
    $("mend").setAttribute("aria-pressed", mend.active);
    $("mend-tools").hidden = !mend.active;
    $("erase").setAttribute("aria-pressed", mend.erasing);
    $("brush").value = mend.size;
    if (mend.active) $("stage").dataset.mending = "yes";
    else delete $("stage").dataset.mending;
  }

  function mended(one, layers) {
    verdicts.set(one, layers ? "reject" : null, layers);
    refill(one);
    list.refresh(list.at);
    showVerdict(one);
    progress();
    announce(layers ? `${one.id}: mended` : `${one.id}: as the run made it`);
  }

  /* Preload the next masks. */
  function ahead(place) {
    for (const next of list.shown.slice(place, place + 2)) {
      details(next).catch(() => {});
      new Image().src = next.picture;
    }
  }

  function element(tag, text, name) {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    if (name) made.className = name;
    return made;
  }

  const fill = (place, children) => place.replaceChildren(...children);
  const written = (name) => name.replaceAll("_", " ");
  const number = (value) => (Number.isInteger(value) ? String(value) : String(Number(value.toPrecision(4))));
  const shown = (value) => (value === null ? "–" : typeof value === "number" ? number(value) : String(value));

  function panel(one) {
    $("name").textContent = one.id;
    const suspicion = one.suspicion === null ? "–" : one.suspicion.toFixed(3);
    $("what").textContent = `${one.kind === "labeled" ? "given" : "pseudo"} mask, rank ${one.rank}, suspicion ${suspicion}`;
    fill($("causes"), one.causes.map((cause) => {
      const [tag, ...detail] = cause.split(": ");
      const line = element("li");
      line.append(element("span", tag, "tag"), detail.length ? ` ${detail.join(": ")}` : "");
      return line;
    }));
    $("causes-none").hidden = one.causes.length > 0;
    fill($("facts"), [...one.columns].filter(([, at]) => one.row[at] !== null).map(([name, at]) => {
      const row = element("tr");
      const head = element("th", written(name));
      head.scope = "row";
      row.append(head, element("td", shown(one.row[at])));
      return row;
    }));
    fill($("history"), []);
    $("note").value = verdicts.get(one)?.note ?? "";
    showVerdict(one);
  }

  function showVerdict(one) {
    const entry = verdicts.get(one);
    for (const button of $("verdicts").querySelectorAll("[data-verdict]")) {
      button.setAttribute("aria-pressed", verdicts.state(one) === button.dataset.verdict);
    }
    $("mend").dataset.mended = entry?.mended ? "yes" : "no";
    $("discard").disabled = !entry?.mended;
    if (document.activeElement !== $("note")) $("note").value = entry?.note ?? "";
    $("note-unsaved").hidden = !entry?.note || Boolean(entry.verdict);
  }

  function decide(verdict) {
    const one = item();
    if (!one) return;
    const before = verdicts.get(one)?.mended;
    if (mend.active) mending(false);
    verdicts.set(one, verdict);
    if (before) refill(one);
    list.refresh(list.at);
    showVerdict(one);
    progress();
    announce(`${one.id}: ${{ accept: "accepted", reject: "rejected", unsure: "unsure" }[verdict]}`);
    if ($("go-on").checked) pick(list.at + 1);
  }

  function undo() {
    const key = verdicts.undo((which) => byKey.get(which));
    if (key === null) return void announce("There is nothing to undo.");
    const place = list.shown.indexOf(byKey.get(key));
    if (place >= 0 && place !== list.at) pick(place);
    else if (item()) {
      if (mend.active) mend.open(item(), mend.given, verdicts.get(item())?.mended);
      refill(item());
    }
    list.refreshAll();
    progress();
    if (item()) showVerdict(item());
    return void announce(`Undone: ${byKey.get(key)?.id ?? ""}`);
  }

  function nextOpen() {
    const open = (place) => !verdicts.get(list.shown[place])?.verdict;
    const places = list.shown.map((_, at) => (list.at + 1 + at) % list.shown.length);
    const place = places.find(open);
    if (place === undefined) announce("All masks of this list are reviewed.");
    else pick(place);
  }

  function progress() {
    const done = verdicts.count(list.items);
    $("progress").textContent = `${done} of ${list.items.length} reviewed`;
    $("bar").max = Math.max(1, list.items.length);
    $("bar").value = done;
    $("listed").textContent = `${list.shown.length} in the list${list.at >= 0 ? `, at ${list.at + 1}` : ""}`;
    $("empty").hidden = list.shown.length > 0 || !list.items.length;
    $("unsaved").textContent = verdicts.unsaved ? "not saved to a file" : "";
    $("no-storage").hidden = verdicts.works;
  }

  const announce = (text) => ($("status").textContent = text);

  function choose() {
    list.choose(filter.read(), $("sort").value, $("direction").dataset.falling === "yes");
    progress();
  }

  /* After a change of the filter: show the first mask if the current one left the list. */
  function filtered() {
    choose();
    if (list.at < 0) pick(0);
    $("panel").hidden = !item();
    if (!item()) view.show(null);
  }

  /* Buttons. */
  function buttons() {
    const click = (id, act) => $(id).addEventListener("click", act);
    view.LAYERS.forEach(([name, label, on, meaning], at) => {
      const button = element("button");
      button.type = "button";
      button.dataset.layer = name;
      button.setAttribute("aria-pressed", on);
      const swatch = element("span", undefined, `swatch ${name}`);
      if (view.COLOURS[name]) swatch.style.setProperty("--colour", view.css(view.COLOURS[name]));
      button.append(element("kbd", String(at + 1)), swatch, label);
      button.title = meaning;
      button.addEventListener("click", () => layer(at));
      const row = element("tr");
      const head = element("th");
      head.scope = "row";
      head.append(swatch.cloneNode(), ` ${label}`);
      row.append(head, element("td", meaning));
      $("legend").append(row);
      $("layers").append(button);
    });
    for (const button of $("verdicts").querySelectorAll("[data-verdict]")) {
      button.addEventListener("click", () => decide(button.dataset.verdict));
    }
    mend.start(mended);
    page.classes.forEach((name, classId) => classId && $("mend-class").append(new Option(name, classId)));
    $("mend-class").append(new Option("ignored", 255));
    $("mend-class").addEventListener("change", () => {
      [mend.classId, mend.erasing] = [Number($("mend-class").value), false];
      tools();
    });
    $("brush").max = mend.SIZES.length - 1;
    $("brush").addEventListener("input", () => mend.resize(Number($("brush").value) - mend.size));
    click("mend", () => mending(!mend.active));
    click("erase", erase);
    click("discard", () => {
      mending(false);
      mended(item(), null);
    });
    $("sort").addEventListener("change", filtered);
    filter.start(filtered, facts);
    click("direction", () => {
      const falling = $("direction").dataset.falling !== "yes";
      $("direction").dataset.falling = falling ? "yes" : "no";
      $("direction").textContent = falling ? "highest first" : "lowest first";
      filtered();
    });
    click("save", save);
    click("load", () => $("file").click());
    $("file").addEventListener("change", read);
    $("note").addEventListener("input", () => {
      verdicts.note(item(), $("note").value);
      showVerdict(item());
      progress();
    });
    $("opacity").addEventListener("input", () => opacity(Number($("opacity").value) / 100));
    click("fill", fillOrOutline);
    const acts = { previous: () => pick(list.at - 1), next: () => pick(list.at + 1), open: nextOpen, undo, fit: view.fit };
    for (const [id, act] of Object.entries({ ...acts, "zoom-in": () => view.zoom(1.4), "zoom-out": () => view.zoom(1 / 1.4) })) {
      click(id, act);
    }
    click("show-summary", reasons);
    for (const id of ["help", "summary"]) click(`show-${id}`, () => $(id).showModal());
    $("single-keys").addEventListener("change", () => (keysOn = $("single-keys").checked));
    document.addEventListener("keydown", pressed);
  }

  /* How often each reason is given for the most suspicious fifth, counted when the summary is opened. */
  function reasons() {
    const ranked = list.items.filter((one) => one.suspicion !== null).sort((a, b) => b.suspicion - a.suspicion);
    const counts = new Map();
    for (const one of ranked.slice(0, Math.ceil(ranked.length / 5))) {
      for (const cause of one.causes) counts.set(list.tag(cause), (counts.get(list.tag(cause)) ?? 0) + 1);
    }
    fill($("reasons"), [...counts].sort(([, a], [, b]) => b - a).map(([tag, count]) => {
      const row = element("tr");
      const head = element("th");
      head.scope = "row";
      head.append(element("span", tag, "tag"));
      const bar = element("progress");
      [bar.max, bar.value, bar.ariaLabel] = [Math.ceil(ranked.length / 5), count, `${tag}: ${count} masks`];
      const cell = element("td", `${count} `);
      cell.append(bar);
      row.append(head, cell);
      return row;
    }));
  }

  function layer(at) {
    const name = view.LAYERS[at][0];
    $("layers").children[at].setAttribute("aria-pressed", view.toggle(name));
  }

  function opacity(value) {
    view.opacity = Math.min(1, Math.max(0, value));
    $("opacity").value = Math.round(100 * view.opacity);
    view.draw();
  }

  function fillOrOutline() {
    view.filled = !view.filled;
    $("fill").setAttribute("aria-pressed", view.filled);
    view.draw();
  }

  function erase() {
    mend.erasing = !mend.erasing;
    tools();
    view.draw();
  }

  function brush(by) {
    mend.resize(by);
    tools();
  }

  function save() {
    verdicts.save(list.items);
    progress();
    announce(`verdicts.json holds ${verdicts.count(list.items)} verdicts; import it with kmine audit --verdicts`);
  }

  async function read() {
    const [file] = $("file").files;
    $("file").value = "";
    if (!file) return;
    try {
      announce(verdicts.read(await file.text(), (key) => byKey.get(key)));
    } catch (error) {
      announce(`${file.name}: ${error.message}`);
    }
    list.refreshAll();
    progress();
    if (item()) showVerdict(item());
  }

  /* Keys. */
  const KEYS = {
    a: () => decide("accept"),
    r: () => decide("reject"),
    u: () => decide("unsure"),
    n: () => pick(list.at + 1),
    ArrowRight: () => pick(list.at + 1),
    p: () => pick(list.at - 1),
    ArrowLeft: () => pick(list.at - 1),
    g: nextOpen,
    z: undo,
    o: fillOrOutline,
    "[": () => opacity(view.opacity - 0.1),
    "]": () => opacity(view.opacity + 0.1),
    "+": () => view.zoom(1.4),
    "=": () => view.zoom(1.4),
    "-": () => view.zoom(1 / 1.4),
    0: () => view.fit(),
    m: () => mending(!mend.active),
    "/": () => $("text").focus(),
    "?": () => $("help").showModal(),
  };
  const MENDING = {
    x: erase,
    ",": () => brush(-1),
    ".": () => brush(1),
    " ": mend.dab,
    Escape: () => mending(false),
    ArrowLeft: () => mend.nudge(-1, 0),
    ArrowRight: () => mend.nudge(1, 0),
    ArrowUp: () => mend.nudge(0, -1),
    ArrowDown: () => mend.nudge(0, 1),
  };
  const IN_LIST = { ArrowDown: KEYS.n, ArrowUp: KEYS.p, Home: () => pick(0), End: () => pick(list.shown.length - 1) };

  function pressed(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (document.querySelector("dialog[open]")) return;
    const at = event.target;
    if (at.matches("textarea, select, input:not([type=checkbox], [type=range])")) {
      if (event.key === "Escape") at.blur();
      return;
    }
    if (at.type === "range" && event.key.startsWith("Arrow")) return;
    const digit = "123456789".indexOf(event.key);
    const act =
      (mend.active && at !== $("list") && !(event.key === " " && at.matches("button, input")) && MENDING[event.key]) ||
      (at === $("list") && Object.hasOwn(IN_LIST, event.key) && IN_LIST[event.key]) ||
      (event.key.length === 1 && !keysOn ? null : digit >= 0 && event.key ? () => layer(digit) : KEYS[event.key]);
    if (!act) return;
    event.preventDefault();
    act();
  }

  start().catch((error) => announce(error.message));
})();
