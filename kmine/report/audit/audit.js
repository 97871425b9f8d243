/* The page: loads the data files, fills the panel, handles keys and buttons. */
"use strict";

(() => {
  const { view, list, verdicts, filter } = kmineAudit;
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
    Object.assign(list, { pick, details, verdictOf: (item) => verdicts.get(item)?.verdict });
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
    verdicts.place(one);
    view.show(one);
    panel(one);
    progress();
    details(one).then(([, , , layers, prompts, history]) => {
      if (item() !== one) return;
      view.fill(one, layers, prompts);
      fill($("history"), history.map((line) => element("li", line)));
      const present = new Set(layers.flatMap(([name, classId]) => (classId === 255 ? [name, "ignored"] : [name])));
      if (prompts.length) present.add("prompts");
      present.add("image");
      for (const button of $("layers").children) button.classList.toggle("absent", !present.has(button.dataset.layer));
      $("classes").hidden = !layers.some(([, classId]) => classId > 1 && classId !== 255);
      ahead(place + 1);
    }, (error) => item() === one && announce(`Masks cannot be shown: ${error.message}`));
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
    fill($("causes"), one.causes.map((cause) => element("li", cause)));
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
    for (const button of $("verdicts").children) {
      button.setAttribute("aria-pressed", entry?.verdict === button.dataset.verdict);
    }
    if (document.activeElement !== $("note")) $("note").value = entry?.note ?? "";
    $("note-unsaved").hidden = !entry?.note || Boolean(entry.verdict);
  }

  function decide(verdict) {
    const one = item();
    if (!one) return;
    verdicts.set(one, verdict);
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
    if (place >= 0) pick(place);
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
    for (const button of $("verdicts").children) button.addEventListener("click", () => decide(button.dataset.verdict));
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
    for (const id of ["help", "summary"]) click(`show-${id}`, () => $(id).showModal());
    $("single-keys").addEventListener("change", () => (keysOn = $("single-keys").checked));
    document.addEventListener("keydown", pressed);
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
    "/": () => $("text").focus(),
    "?": () => $("help").showModal(),
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
      (at === $("list") && Object.hasOwn(IN_LIST, event.key) && IN_LIST[event.key]) ||
      (event.key.length === 1 && !keysOn ? null : digit >= 0 && event.key ? () => layer(digit) : KEYS[event.key]);
    if (!act) return;
    event.preventDefault();
    act();
  }

  start().catch((error) => announce(error.message));
})();
