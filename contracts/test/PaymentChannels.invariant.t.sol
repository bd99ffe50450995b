// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";
import {MarketToken} from "../src/MarketToken.sol";
import {PaymentChannels} from "../src/PaymentChannels.sol";
import {Base} from "./Base.sol";

/// Plays every role with valid and invalid moves, and keeps its own books beside the contract's.
contract ChannelsHandler is Base {
    uint256[3] private keys = [uint256(0xA1), 0xA2, 0xA3];
    uint256[2] private payeeKeys = [uint256(0xB1), 0xB2];
    uint40 public constant WINDOW = 600;
    uint96 private constant POSITION_MAX = 5e19;
    uint256 private constant TOTAL_MAX = 4e20;
    address private constant GUARDIAN = address(0x6A);

    MarketToken public token;
    PaymentChannels public channels;
    bytes32[] public ids;
    mapping(bytes32 => uint256) private ownerOf;
    mapping(bytes32 => uint256) private payeeOf;
    mapping(bytes32 => uint96) public signed; // highest voucher or push of each channel
    mapping(bytes32 => uint96) public claimed; // as last seen
    mapping(bytes32 => bool) public closed;
    bool public claimedFell;
    bool public forged;
    bool public paidAboveSigned;
    bool public letInWrongly;
    bool public keptOutWrongly;
    bool public intruded;

    constructor() {
        vm.chainId(31337);
        vm.warp(1_000_000);
        token = new MarketToken();
        channels = new PaymentChannels(IERC20(address(token)), WINDOW, GUARDIAN, POSITION_MAX, TOTAL_MAX);
        for (uint256 i = 0; i < keys.length; ++i) {
            _fund(token, vm.addr(keys[i]), address(channels), 100);
        }
    }

    modifier watched() {
        _;
        for (uint256 i = 0; i < ids.length; ++i) {
            bytes32 id = ids[i];
            PaymentChannels.Channel memory c = channels.channel(id);
            if (closed[id]) {
                if (c.signer != address(0)) claimedFell = true;
                continue;
            }
            if (c.claimed < claimed[id]) claimedFell = true;
            if (c.claimed > signed[id]) paidAboveSigned = true;
            claimed[id] = c.claimed;
        }
    }

    function count() external view returns (uint256) {
        return ids.length;
    }

    function payees() external view returns (address[2] memory) {
        return [vm.addr(payeeKeys[0]), vm.addr(payeeKeys[1])];
    }

    function open(uint256 who, uint256 to, uint96 amount) external watched {
        if (ids.length > 12) return;
        (who, to) = (who % 3, to % 2);
        amount = uint96(_bound(amount, 1, POSITION_MAX + POSITION_MAX / 8));
        bool allowed = _mayEnter(amount, amount);
        vm.prank(vm.addr(keys[who]));
        try channels.open(
            vm.addr(payeeKeys[to]), vm.addr(keys[who]), amount, uint40(block.timestamp) + 1 days
        ) returns (bytes32 id) {
            if (!allowed) letInWrongly = true;
            ids.push(id);
            (ownerOf[id], payeeOf[id]) = (who, to);
        } catch {
            if (allowed) keptOutWrongly = true;
        }
    }

    function topUp(uint256 pick, uint96 amount) external watched {
        (bool ok, bytes32 id) = _pick(pick);
        PaymentChannels.Channel memory c = channels.channel(id);
        if (!ok || c.closesAt != 0) return;
        amount = uint96(_bound(amount, 1, POSITION_MAX));
        uint40 expiresAt = c.expiresAt > block.timestamp ? c.expiresAt : uint40(block.timestamp) + 1;
        bool allowed = _mayEnter(amount, uint256(c.deposit) - c.claimed + amount);
        vm.prank(c.payer);
        try channels.topUp(id, amount, expiresAt) {
            if (!allowed) letInWrongly = true;
        } catch {
            if (allowed) keptOutWrongly = true;
        }
    }

    function pause(bool paused) external watched {
        vm.prank(GUARDIAN);
        channels.pauseEntry(paused);
    }

    /// A stranger tries every move that belongs to somebody.
    function intrude(uint256 pick, uint160 who) external watched {
        (bool ok, bytes32 id) = _pick(pick);
        if (!ok) return;
        address stranger = address(uint160(_bound(who, 0x1000, type(uint128).max)));
        (bytes32[] memory one, uint96[] memory amount) = (new bytes32[](1), new uint96[](1));
        (one[0], amount[0]) = (id, 1);
        bytes[6] memory moves = [
            abi.encodeCall(channels.topUp, (id, 0, type(uint40).max)),
            abi.encodeCall(channels.requestClose, (id)),
            abi.encodeCall(channels.close, (id)),
            abi.encodeCall(channels.push, (one, amount)),
            abi.encodeCall(channels.withdraw, (stranger)),
            abi.encodeCall(channels.pauseEntry, (true))
        ];
        for (uint256 i = 0; i < moves.length; ++i) {
            vm.prank(stranger);
            (bool done,) = address(channels).call(moves[i]);
            if (done) intruded = true;
        }
    }

    function redeem(uint256 pick, uint96 cumulative) external watched {
        (bool ok, bytes32 id) = _pick(pick);
        PaymentChannels.Channel memory c = channels.channel(id);
        if (!ok || c.claimed == c.deposit) return;
        cumulative = uint96(_bound(cumulative, uint256(c.claimed) + 1, c.deposit));
        _note(id, cumulative);
        channels.redeem(id, cumulative, _signature(keys[ownerOf[id]], channels.voucherDigest(id, cumulative)));
    }

    /// Two good vouchers, a repeat, and one signed by the wrong key.
    function redeemMany(uint256 a, uint256 b, uint96 cumulativeA, uint96 cumulativeB) external watched {
        (bool ok, bytes32 first) = _pick(a);
        if (!ok) return;
        (, bytes32 second) = _pick(b);
        PaymentChannels.Claim[] memory claims = new PaymentChannels.Claim[](4);
        claims[0] = _claim(first, cumulativeA, keys[ownerOf[first]]);
        claims[1] = _claim(second, cumulativeB, keys[ownerOf[second]]);
        claims[2] = claims[0];
        claims[3] = _claim(first, type(uint96).max, 0xBAD);
        channels.redeemMany(claims);
    }

    function push(uint256 pick, uint96 cumulative) external watched {
        (bool ok, bytes32 id) = _pick(pick);
        if (!ok) return;
        bytes32[] memory which = new bytes32[](2);
        uint96[] memory amounts = new uint96[](2);
        (which[0], which[1]) = (id, id);
        amounts[0] = uint96(_bound(cumulative, 0, channels.channel(id).deposit));
        amounts[1] = amounts[0];
        _note(id, amounts[0]);
        vm.prank(vm.addr(keys[ownerOf[id]]));
        channels.push(which, amounts);
    }

    function forge(uint256 pick, uint96 cumulative, uint256 key) external watched {
        (bool ok, bytes32 id) = _pick(pick);
        if (!ok) return;
        key = _bound(key, 0x1000, type(uint64).max);
        bytes memory signature = _signature(key, channels.voucherDigest(id, cumulative));
        try channels.redeem(id, cumulative, signature) {
            forged = true;
        } catch {
            return; // as it must
        }
    }

    function cooperativeClose(uint256 pick, uint96 cumulative) external watched {
        (bool ok, bytes32 id) = _pick(pick);
        if (!ok) return;
        PaymentChannels.Channel memory c = channels.channel(id);
        cumulative = uint96(_bound(cumulative, 0, c.deposit));
        bytes memory consent = _signature(payeeKeys[payeeOf[id]], channels.closeDigest(id, cumulative));
        vm.prank(c.payer);
        channels.cooperativeClose(id, cumulative, consent);
        closed[id] = true;
    }

    function requestClose(uint256 pick) external watched {
        (bool ok, bytes32 id) = _pick(pick);
        PaymentChannels.Channel memory c = channels.channel(id);
        if (!ok || c.closesAt != 0) return;
        vm.prank(c.payer);
        channels.requestClose(id);
    }

    function close(uint256 pick, uint256 wait) external watched {
        (bool ok, bytes32 id) = _pick(pick);
        if (!ok) return;
        vm.warp(block.timestamp + wait % 1 days);
        PaymentChannels.Channel memory c = channels.channel(id);
        if (block.timestamp < c.expiresAt && (c.closesAt == 0 || block.timestamp < c.closesAt)) return;
        vm.prank(c.payer);
        channels.close(id);
        closed[id] = true;
    }

    function withdraw(uint256 who) external watched {
        address payee = vm.addr(payeeKeys[who % 2]);
        if (channels.credited(payee) == 0) return;
        vm.prank(payee);
        channels.withdraw(payee);
    }

    function _claim(bytes32 id, uint96 cumulative, uint256 key) private returns (PaymentChannels.Claim memory) {
        if (key != 0xBAD) {
            cumulative = uint96(_bound(cumulative, 0, channels.channel(id).deposit));
            _note(id, cumulative);
        }
        (bytes32 r, bytes32 vs) = _compact(key, channels.voucherDigest(id, cumulative));
        return PaymentChannels.Claim(id, cumulative, r, vs);
    }

    function _mayEnter(uint96 amount, uint256 held) private view returns (bool) {
        uint256 total = token.balanceOf(address(channels)) + amount;
        return !channels.entryPaused() && held <= POSITION_MAX && total <= TOTAL_MAX;
    }

    function _note(bytes32 id, uint96 cumulative) private {
        if (cumulative > signed[id]) signed[id] = cumulative;
    }

    function _pick(uint256 pick) private view returns (bool ok, bytes32 id) {
        if (ids.length == 0) return (false, 0);
        id = ids[pick % ids.length];
        return (!closed[id], id);
    }
}

contract PaymentChannelsInvariants is Base {
    ChannelsHandler private handler;

    function setUp() public {
        handler = new ChannelsHandler();
        _target(address(handler));
    }

    /// I1: what the contract holds is exactly what open channels have left plus what is credited.
    function invariant_solvency() public view {
        PaymentChannels channels = handler.channels();
        uint256 owed;
        for (uint256 i = 0; i < handler.count(); ++i) {
            PaymentChannels.Channel memory c = channels.channel(handler.ids(i));
            owed += c.deposit - c.claimed;
        }
        address[2] memory payees = handler.payees();
        owed += channels.credited(payees[0]) + channels.credited(payees[1]);
        _eq(handler.token().balanceOf(address(channels)), owed, "solvency");
    }

    /// claimed only rises, and a closed channel stays closed.
    function invariant_redemption_is_monotonic() public view {
        _true(!handler.claimedFell(), "claimed fell, or a channel came back");
    }

    /// Nobody is paid what its signer did not sign or push, and nobody moves what is another's.
    function invariant_no_forgery() public view {
        _true(!handler.forged(), "a forged voucher was paid");
        _true(!handler.paidAboveSigned(), "more was paid than signed");
        _true(!handler.intruded(), "a stranger's move went through");
    }

    /// The limits and the pause refuse exactly what they say.
    function invariant_entry_is_refused_exactly_above_the_limits_and_while_paused() public view {
        _true(!handler.letInWrongly(), "let in above a limit or while paused");
        _true(!handler.keptOutWrongly(), "kept out within the limits");
    }

    /// From every state that was reached, paused or not: every payer and payee gets out, and nothing is left behind.
    function invariant_liveness_of_exit() public {
        PaymentChannels channels = handler.channels();
        uint256 start = block.timestamp;
        for (uint256 i = 0; i < handler.count(); ++i) {
            bytes32 id = handler.ids(i);
            PaymentChannels.Channel memory c = channels.channel(id);
            if (c.payer == address(0)) continue;
            vm.startPrank(c.payer);
            if (c.closesAt == 0) channels.requestClose(id);
            vm.warp(start + handler.WINDOW());
            channels.close(id);
            vm.stopPrank();
            vm.warp(start);
        }
        address[2] memory payees = handler.payees();
        for (uint256 i = 0; i < 2; ++i) {
            if (channels.credited(payees[i]) == 0) continue;
            vm.prank(payees[i]);
            channels.withdraw(payees[i]);
        }
        _eq(handler.token().balanceOf(address(channels)), 0, "left behind");
    }
}
