// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {ERC20} from "@openzeppelin/contracts/token/ERC20/ERC20.sol";
import {PaymentChannels} from "../src/PaymentChannels.sol";
import {Base} from "../test/Base.sol";

contract PlainToken is ERC20("plain", "P") {
    constructor() {
        _mint(msg.sender, type(uint128).max);
    }
}

/// Proofs for every value at once, by symbolic execution of the compiled code. What they stand on: the token is OpenZeppelin's ERC-20, keccak
/// has no collisions, and ecrecover is some fixed function of its arguments (nothing is assumed of who can compute its inverse).
contract PaymentChannelsProof is Base {
    uint40 private constant WINDOW = 600;
    address private constant PAYER = address(0x1001);
    address private constant PAYEE = address(0x2002);
    PlainToken private token;
    PaymentChannels private channels;

    function setUp() public {
        vm.warp(1_000_000);
        token = new PlainToken();
        channels = new PaymentChannels(token, WINDOW, address(0), 0, 0);
        token.transfer(PAYER, type(uint120).max);
        vm.prank(PAYER);
        token.approve(address(channels), type(uint256).max);
    }

    function _open(address signer, uint96 deposit) private returns (bytes32 id) {
        vm.prank(PAYER);
        id = channels.open(PAYEE, signer, deposit, type(uint40).max);
    }

    /// Whatever deposit, amounts, signature and caller: a redemption that goes through was signed by the channel's signer, pays the payee
    /// exactly the rise of `claimed`, raises it to what was signed and never above the deposit.
    function check_redeem_pays_exactly_what_the_signer_signed(
        address signer,
        uint96 deposit,
        uint96 cumulative,
        bytes32 r,
        bytes32 s,
        uint8 v,
        address caller
    ) public {
        vm.assume(signer != address(0) && deposit != 0);
        bytes32 id = _open(signer, deposit);
        bytes32 digest = channels.voucherDigest(id, cumulative);
        vm.prank(caller);
        (bool done,) =
            address(channels).call(abi.encodeCall(channels.redeem, (id, cumulative, abi.encodePacked(r, s, v))));
        uint96 claimed = channels.channel(id).claimed;
        if (!done) {
            assert(claimed == 0 && token.balanceOf(PAYEE) == 0);
            return;
        }
        assert(ecrecover(digest, v, r, s) == signer);
        assert(claimed == cumulative && cumulative != 0 && cumulative <= deposit);
        assert(token.balanceOf(PAYEE) == cumulative);
        assert(token.balanceOf(address(channels)) == uint256(deposit) - cumulative);
    }

    /// The second redemption of a channel pays the difference only, and `claimed` never falls.
    function check_redeem_twice_is_monotonic_and_pays_the_difference(
        uint96 deposit,
        uint96 first,
        uint96 second,
        bytes32 r,
        bytes32 s,
        uint8 v
    ) public {
        vm.assume(first != 0 && first <= deposit);
        address signer = address(0x3003);
        bytes32 id = _open(signer, deposit);
        bytes32[] memory ids = new bytes32[](1);
        uint96[] memory amounts = new uint96[](1);
        (ids[0], amounts[0]) = (id, first);
        vm.prank(signer);
        channels.push(ids, amounts);
        (bool done,) = address(channels).call(abi.encodeCall(channels.redeem, (id, second, abi.encodePacked(r, s, v))));
        uint96 claimed = channels.channel(id).claimed;
        assert(claimed >= first && claimed <= deposit);
        assert(done == (claimed > first));
        assert(token.balanceOf(PAYEE) == uint256(claimed) - first);
        assert(channels.credited(PAYEE) == first);
    }

    /// A batch obeys the same rules: an item is credited only when its signer signed it.
    function check_redeemMany_credits_only_what_the_signer_signed(
        address signer,
        uint96 deposit,
        uint96 cumulative,
        bytes32 r,
        bytes32 vs
    ) public {
        vm.assume(signer != address(0) && deposit != 0);
        bytes32 id = _open(signer, deposit);
        PaymentChannels.Claim[] memory claims = new PaymentChannels.Claim[](1);
        claims[0] = PaymentChannels.Claim(id, cumulative, r, vs);
        channels.redeemMany(claims);
        uint256 credited = channels.credited(PAYEE);
        assert(credited == channels.channel(id).claimed);
        if (credited == 0) return;
        assert(credited == cumulative && cumulative <= deposit);
        uint8 v = uint8(uint256(vs) >> 255) + 27;
        bytes32 s = vs & bytes32(uint256(type(uint256).max) >> 1);
        assert(ecrecover(channels.voucherDigest(id, cumulative), v, r, s) == signer);
    }

    /// No close comes before the window is over, whoever asks and whenever; and a close pays the payer exactly the rest.
    function check_close_waits_for_the_window_and_pays_the_rest(uint96 deposit, uint96 claimed, uint40 wait, address caller)
        public
    {
        vm.assume(deposit != 0 && claimed <= deposit);
        address signer = address(0x3003);
        bytes32 id = _open(signer, deposit);
        bytes32[] memory ids = new bytes32[](1);
        uint96[] memory amounts = new uint96[](1);
        (ids[0], amounts[0]) = (id, claimed);
        vm.prank(signer);
        channels.push(ids, amounts);
        vm.prank(PAYER);
        channels.requestClose(id);
        vm.assume(wait < 10 * WINDOW);
        vm.warp(block.timestamp + wait);
        uint256 before = token.balanceOf(PAYER);
        vm.prank(caller);
        (bool done,) = address(channels).call(abi.encodeCall(channels.close, (id)));
        assert(done == (caller == PAYER && wait >= WINDOW));
        if (done) assert(token.balanceOf(PAYER) == before + deposit - claimed);
    }
}
