// Runs in an isolated world of the page: finds what a person could click, as it is visible now.
// Returns {elements: [Element], report: JSON}; boxes are CSS pixels of the viewport; reason: why one is left out, or "";
// use: what it is for a person who acts on the page.
(minSide) => {
  const CLICKABLE =
    'a[href], button, input:not([type=hidden]), select, textarea, summary, [contenteditable=""], [contenteditable=true],' +
    "[onclick], [role=button], [role=link], [role=tab], [role=menuitem], [role=menuitemcheckbox], [role=menuitemradio]," +
    "[role=checkbox], [role=radio], [role=switch], [role=option], [role=combobox], [role=textbox], [role=searchbox]," +
    "[role=treeitem], [role=slider], [role=spinbutton]";
  const HEADINGS = "h1, h2, h3, h4, h5, h6, [role=heading], legend, caption";
  const squeeze = (text) => (text || "").replace(/\s+/g, " ").trim();
  const overlap = (a, b) => ({
    left: Math.max(a.left, b.left), top: Math.max(a.top, b.top),
    right: Math.min(a.right, b.right), bottom: Math.min(a.bottom, b.bottom),
  });
  const size = (box) => Math.max(0, box.right - box.left) * Math.max(0, box.bottom - box.top);
  const viewport = { left: 0, top: 0, right: innerWidth, bottom: innerHeight };

  // The part of the element's box that its scrolling or clipping ancestors and the viewport let through.
  const visibleBox = (element) => {
    const own = element.getBoundingClientRect();
    let box = overlap(own, viewport);
    for (let node = element; node && node !== document.body; node = node.parentElement) {
      const style = getComputedStyle(node);
      if (node !== element && /(auto|scroll|hidden|clip)/.test(style.overflowX + style.overflowY)) {
        box = overlap(box, node.getBoundingClientRect());
      }
      if (style.position === "fixed") break;
    }
    return { own, box };
  };

  const isHidden = (element) =>
    !element.checkVisibility({ opacityProperty: true, visibilityProperty: true, contentVisibilityAuto: true });

  // A click at this point lands on the element itself (or on its label, or on plain content inside it).
  const isHit = (element, x, y) => {
    const hit = document.elementFromPoint(x, y);
    if (!hit) return false;
    if (hit === element) return true;
    if (element.contains(hit)) return hit.closest(CLICKABLE) === element;
    return !!element.labels && [...element.labels].some((label) => label === hit || label.contains(hit));
  };

  const numHits = (element, box) => {
    let hits = 0;
    for (const fx of [0.15, 0.5, 0.85]) {
      for (const fy of [0.15, 0.5, 0.85]) {
        hits += isHit(element, box.left + fx * (box.right - box.left), box.top + fy * (box.bottom - box.top));
      }
    }
    return hits;
  };

  // Text that can be read inside the box: no screen-reader-only text, no text pushed off the element.
  const visibleText = (element, box) => {
    if (element.matches("input:not([type=checkbox]):not([type=radio]):not([type=range]):not([type=color])," +
        "textarea")) {
      if (element.type === "image") return "";
      if (element.type === "password" && element.value) return "";
      return squeeze(element.value || element.placeholder);
    }
    if (element.matches("select")) {
      return squeeze(element.selectedOptions[0] ? element.selectedOptions[0].textContent : "");
    }
    const walker = document.createTreeWalker(element, NodeFilter.SHOW_TEXT);
    const range = document.createRange();
    let text = "";
    for (let node = walker.nextNode(); node; node = walker.nextNode()) {
      if (!node.textContent.trim() || isHidden(node.parentElement)) continue;
      range.selectNodeContents(node);
      const shown = overlap(range.getBoundingClientRect(), overlap(node.parentElement.getBoundingClientRect(), box));
      if (shown.right - shown.left >= minSide && shown.bottom - shown.top >= minSide) text += " " + node.textContent;
    }
    return squeeze(text);
  };

  const headings = [...document.querySelectorAll(HEADINGS)].filter((heading) => {
    if (isHidden(heading)) return false;
    const { own, box } = visibleBox(heading);
    return size(own) > 0 && size(box) > 0.9 * size(own);
  });
  // The heading of the part the element stands in: the last one before it whose parent holds the element too, or whose
  // grandparent does (a heading in a title row), unless that is the whole page.
  const headingOf = (element, box) => {
    const governs = (heading) => {
      const parent = heading.parentElement;
      if (heading.contains(element) || !parent) return false;
      if (!(heading.compareDocumentPosition(element) & Node.DOCUMENT_POSITION_FOLLOWING)) return false;
      if (parent.contains(element)) return true;
      const above = parent.parentElement;
      return !!above && above !== document.body && above !== document.documentElement && above.contains(element);
    };
    const last = headings.filter(governs).pop();
    return last && last.getBoundingClientRect().top <= box.top + 1 ? squeeze(last.innerText) : "";
  };

  // What a person would expect of an element before acting on it.
  const TYPED = "input:not([type]), input[type=text], input[type=search], input[type=email], input[type=url]," +
    "input[type=tel], input[type=password], input[type=number], textarea, [contenteditable=''], [contenteditable=true]";
  const DIALOGS = "dialog[open], [role=dialog], [role=alertdialog]";
  const MENUS = "[role=menu], [role=listbox], [popover]";
  const isShown = (element) => !isHidden(element) && size(visibleBox(element).box) > 0;
  const shown = (selector) => [...document.querySelectorAll(selector)].filter(isShown);
  const use = (element) => {
    const link = element.closest("a[href]");
    const isSame = link && (!link.target || link.target === "_self");
    let kind = "other";
    if (element.matches(TYPED) && !element.readOnly) kind = "field";
    else if (element.matches("select, input[type=file], input[type=color], input[type=date], input[type=time], a[download]")) {
      kind = "native";
    } else if (element.matches("[role=tab]")) kind = "tab";
    else if (element.matches("summary, [aria-haspopup], [aria-expanded], [popovertarget]")) kind = "opener";
    else if (link) kind = "link";
    const layer = element.closest(DIALOGS) ? "dialog" : element.closest(MENUS) ? "menu" : "";
    return {
      kind, layer, href: link ? (isSame ? link.href : "elsewhere") : "",
      value: kind === "field" ? element.value || (element.isContentEditable ? element.textContent : "") || "" : "",
      focused: document.activeElement === element,
      chosen: element.matches("[aria-selected=true], [aria-current]"),
    };
  };
  // Areas that scroll, with how far they can, in CSS pixels; the page itself first.
  const scrollAreas = () => {
    const page = document.scrollingElement || document.documentElement;
    const inner = [...document.body.querySelectorAll("*")].filter((element) =>
      element.scrollHeight > element.clientHeight + 8 && element.clientHeight > 60 &&
      /(auto|scroll)/.test(getComputedStyle(element).overflowY) && isShown(element));
    return [page, ...inner].map((element) => {
      const box = element === page ? viewport : visibleBox(element).box;
      const up = element.scrollTop;
      const down = element.scrollHeight - element.clientHeight - up;
      const x = (box.left + box.right) / 2, y = (box.top + box.bottom) / 2;
      const hit = document.elementFromPoint(x, y);
      return { x, y, up, down, height: box.bottom - box.top, reached: !!hit && (element === page || element.contains(hit)) };
    }).filter((area) => area.up + area.down > 8 && area.reached);
  };

  const elements = [];
  const found = [];
  const dropped = {};
  const drop = (reason) => { dropped[reason] = (dropped[reason] || 0) + 1; };
  for (const element of document.querySelectorAll(CLICKABLE)) {
    const whole = element.getBoundingClientRect();
    if (size(whole) === 0 || isHidden(element)) { drop("hidden"); continue; }
    if (size(overlap(whole, viewport)) === 0) { drop("outside the viewport"); continue; }
    const { own, box } = visibleBox(element);
    let reason = "";
    if (element.matches(":disabled, [aria-disabled=true]")) reason = "disabled";
    else if (box.right - box.left < minSide || box.bottom - box.top < minSide) reason = "too small";
    else if (size(box) < 0.9 * size(own)) reason = "cut off at an edge";
    else if (!isHit(element, (box.left + box.right) / 2, (box.top + box.bottom) / 2)) reason = "occluded at its centre";
    else if (numHits(element, box) < 7) reason = "partly covered";
    if (reason) drop(reason);
    // What is left out may still be seen, and then its name is no longer unique: reported with the reason.
    elements.push(element);
    found.push({
      reason,
      box: [box.left, box.top, box.right, box.bottom],
      text: reason ? "" : visibleText(element, box),
      heading: headingOf(element, box),
      title: squeeze(element.getAttribute("title")),
      aria: squeeze(element.getAttribute("aria-label")),
      use: use(element),
    });
  }
  const layers = { dialogs: shown(DIALOGS).length, menus: shown(MENUS).length };
  const report = { found, dropped, href: location.href, layers, scroll: document.body ? scrollAreas() : [] };
  return { elements, report: JSON.stringify(report) };
}
